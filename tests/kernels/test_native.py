"""Which recipes TransformerEngine has, what it is asked for, and why it is passed over."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels.gemm_recipes import LinearRecipe
from kernels.native import Unsupported, native_recipe, recipe_of, refuse_capability
from models.recipes import linear_recipe
from runner.records.config import validate
from tests.kernels.oracles import te_recipes

Compose = Callable[..., dict[str, Any]]
KNOWN = {
    "fp8_delayed": (
        "DelayedScaling",
        {"amax_history_len": 1024, "amax_compute_algo": "max", "margin": 0},
    ),
    "fp8_current": ("Float8CurrentScaling", {"use_power_2_scales": False}),
    "fp8_block": (
        "Float8BlockScaling",
        {"x_block_scaling_dim": 1, "w_block_scaling_dim": 2, "use_f32_scales": False},
    ),
    "deepseek_fp8": ("Float8BlockScaling", {"grad_block_scaling_dim": 1, "use_f32_scales": True}),
    "mxfp8": ("MXFP8BlockScaling", {"enable_2d_quantization": False}),
    "nvfp4": (
        "NVFP4BlockScaling",
        {
            "disable_rht": False,
            "disable_stochastic_rounding": False,
            "disable_2d_quantization": False,
        },
    ),
    "nvfp4_no_rht": ("NVFP4BlockScaling", {"disable_rht": True}),
    "nvfp4_no_sr": ("NVFP4BlockScaling", {"disable_stochastic_rounding": True}),
    "nvfp4_no_2d": ("NVFP4BlockScaling", {"disable_2d_quantization": True}),
    "nvfp4_forward": ("NVFP4BlockScaling", {"backward_override": "high_precision"}),
}


def _linear(compose: Compose, *overrides: str) -> LinearRecipe:
    found: LinearRecipe = linear_recipe(validate(compose(*overrides)).precision.default)
    return found


@pytest.mark.parametrize("name", KNOWN)
def test_a_recipe_is_transformer_engines_with_its_knobs(name: str, compose: Compose) -> None:
    recipes = te_recipes()
    kind, arguments = recipe_of(_linear(compose, f"precision={name}"))
    wanted, knobs = KNOWN[name]
    assert kind == wanted
    if "fp8_format" in arguments:
        arguments["fp8_format"] = recipes.Format[arguments["fp8_format"]]
    made = getattr(recipes, kind)(**arguments)
    assert {knob: getattr(made, knob) for knob in knobs} == knobs
    backward = {"fp8_delayed": "HYBRID", "fp8_current": "HYBRID"}.get(name, "E4M3")
    assert made.fp8_format.name == backward


X, W = (f"precision.fprop.{operand}" for operand in "xw")
UNQUANTISED = [
    f"precision.{operand}.{key}"
    for operand in ("dgrad.g", "dgrad.w", "wgrad.g", "wgrad.x")
    for key in ("format=compute", "scale=null")
]
OURS = ("quartet2", "tetrajet_v2", "ufp4", "averis")
KEPT = [f"precision.{gemm}.saved=quantised" for gemm in ("dgrad", "wgrad")]
FOUR_OVER_SIX = [f"{key}.four_over_six=true" for key in (X, W)]


@pytest.mark.parametrize(
    ("overrides", "knobs"),
    [
        (
            ["precision=nvfp4_forward", f"{X}.row_scaled=true"],
            {"row_scaled_activation": True, "nvfp4_4over6": "none"},
        ),
        (
            ["precision=nvfp4_forward", *FOUR_OVER_SIX, f"{W}.e4m3_max=256"],
            {"nvfp4_4over6": "all", "nvfp4_4over6_e4m3_use_256": "weights"},
        ),
        (
            ["precision=nvfp4_forward", *KEPT],
            {"backward_override": "dequantized", "disable_2d_quantization": False},
        ),
        (
            [
                "precision=nvfp4",
                *(f"precision.{gemm}.w.four_over_six=true" for gemm in ("fprop", "dgrad")),
                *(f"precision.{gemm}.w.four_over_six_error=mse" for gemm in ("fprop", "dgrad")),
            ],
            {
                "disable_rht": False,
                "nvfp4_4over6": "weights",
                "nvfp4_4over6_e4m3_use_256": "none",
                "nvfp4_4over6_err_mode": "MSE",
            },
        ),
    ],
)
def test_row_scales_four_over_six_and_kept_operands_are_knobs_of_its_recipe(
    overrides: list[str], knobs: dict[str, Any], compose: Compose
) -> None:
    kind, arguments = recipe_of(_linear(compose, *overrides))
    made = getattr(te_recipes(), kind)(**arguments)
    assert {knob: getattr(made, knob) for knob in knobs} == knobs


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["precision=nvfp4", f"{X}.four_over_six=true", "precision.wgrad.x.four_over_six=true"],
            "no such recipe",
        ),
        (["precision=nvfp4", f"{X}.row_scaled=true"], "no such recipe"),
        (["precision=mxfp4"], "no such recipe"),
        (["precision=nvfp4", *KEPT], r"no such recipe: dgrad\.saved, wgrad\.saved"),
        (["precision=nvfp4_forward", KEPT[0]], r"no such recipe: .*dgrad\.saved"),
        (
            ["precision=fp8_delayed", *UNQUANTISED],
            "DelayedScaling quantises the backward pass too",
        ),
        *(([f"precision={name}"], "no such recipe") for name in OURS),
        (["precision=nvfp4_backward"], "no backward pass alone"),
        (["precision=nvfp4", "precision.wgrad.hadamard=32"], r"no such recipe: wgrad\.hadamard"),
        (["precision=nvfp4", "precision.fprop.x.quantile=0.999"], r"no such recipe: fprop\.x"),
    ],
)
def test_what_it_has_not_is_named(overrides: list[str], message: str, compose: Compose) -> None:
    with pytest.raises(Unsupported, match=message):
        recipe_of(_linear(compose, *overrides))


def test_hardware_and_installation_are_checked_with_a_reason(compose: Compose) -> None:
    recipe = _linear(compose, "precision=nvfp4")
    with pytest.raises(Unsupported, match="only a GPU"):
        native_recipe(recipe, torch.device("cpu"))
    with pytest.raises(
        Unsupported, match=r"NVFP4BlockScaling needs compute capability 10\.0, not 9\.0"
    ):
        refuse_capability(recipe, (9, 0))
    refuse_capability(_linear(compose, "precision=fp8_block"), (9, 0))
    refuse_capability(recipe, (10, 0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_a_missing_transformer_engine_is_a_reason_not_a_crash(compose: Compose) -> None:
    with pytest.raises(Unsupported, match=r"not installed \(pip install espalier\[te\]\)"):
        native_recipe(_linear(compose, "precision=fp8_current"), torch.device("cuda"))
