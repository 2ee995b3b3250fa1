"""Recipes that cannot be meant are refused, with what is valid."""

from collections.abc import Callable
from typing import Any

import pytest

from models.operand_config import OperandConfig
from models.precision_config import (
    DgradConfig,
    FpropConfig,
    PrecisionConfig,
    RuleConfig,
)
from runner.machine.errors import ConfigError
from runner.records.config import validate

Compose = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("precision.fprop.x.format=fp5", "'nvfp4', 'mxfp4'"),
        ("precision.fprop.x.block='16'", "block=16 must be ROWSxCOLS, 1x16 for example"),
        ("precision.fprop.x.scale=floor", "scale=floor is none of te214, paper, ms_eden"),
        (
            "precision.dgrad.g.row_scaled=true precision.dgrad.g.block=16x16",
            "row_scaled needs blocks of one row",
        ),
        ("precision.wgrad.hadamard=24", "hadamard=24 is none of 0, 16, 32, 64, 128"),
        ("precision.compute=fp32", "quantised GEMMs need compute=bf16"),
        ("precision.keep_last=2.5", "keep_last=2.5 must be a number of blocks or a share"),
        ("precision.fprop.y=1", "fprop"),
    ],
)
def test_bad_recipes_are_refused_with_what_is_valid(
    override: str, message: str, compose: Compose
) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(compose("precision=nvfp4", *override.split()))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"four_over_six": True, "rounding": "stochastic"}, "four_over_six rounds to nearest"),
        ({"four_over_six": True, "sr_headroom": 1.0625}, "sr_headroom=1.0625 is for nvfp4 without"),
        ({"format": "fp8_e4m3", "sr_headroom": 1.0625}, "sr_headroom=1.0625 is for nvfp4 without"),
        ({"row_scaled": True, "quantile": 0.999}, "quantile is that of the tensor"),
        ({"scale": "ms_eden"}, "scale=ms_eden makes up for the rounding of a rotated tensor"),
        ({"scale": "double_block", "quantile": 0.9}, "quantile does not count with scale=double"),
        ({"centred": True}, "centred is for fprop.x and wgrad.x with a format"),
    ],
)
def test_an_option_that_would_not_count_is_refused_before_a_run(
    options: dict[str, Any], message: str
) -> None:
    """Cells frozen before the check can still be read."""
    dgrad = DgradConfig(g=OperandConfig(**({"format": "nvfp4"} | options)))
    rule = RuleConfig(match="*.mlp.*", dgrad=dgrad)
    for cfg, where in (({"dgrad": dgrad}, "dgrad.g"), ({"rules": (rule,)}, r"rules '\*\.mlp\.\*'")):
        with pytest.raises(ValueError, match=f"^{where}.*: {message}"):
            PrecisionConfig(compute="bf16", **cfg).check(10)


@pytest.mark.parametrize(
    ("fprop", "message"),
    [
        (FpropConfig(), "dgrad: saved=quantised needs a format of fprop.w; leave it out"),
        (
            FpropConfig(w=OperandConfig(format="nvfp4"), hadamard=16),
            "saved=quantised would keep a tensor that fprop.hadamard",
        ),
    ],
)
def test_a_forward_pass_that_quantises_nothing_to_keep_is_refused(
    fprop: FpropConfig, message: str
) -> None:
    cfg = PrecisionConfig(compute="bf16", fprop=fprop, dgrad=DgradConfig(saved="quantised"))
    with pytest.raises(ValueError, match=message):
        cfg.check(10)


def test_stochastic_rounding_is_for_four_bits_only() -> None:
    with pytest.raises(
        ValueError, match="rounding=stochastic is for nvfp4, ufp4 and mxfp4, not for fp8_e4m3"
    ):
        OperandConfig(format="fp8_e4m3", rounding="stochastic")
