"""Linear layers on low-precision tensor cores, through TransformerEngine where the machine has both.

TransformerEngine knows five recipes, each for all three GEMMs of a layer. A `LinearRecipe` that is one of
them can run there; everything else, and every machine without the units, is emulated. What differs
from the emulation: accumulation is the hardware's, gradients of weights leave their GEMM in bf16, and
stochastic rounding draws from torch's CUDA generator.

Sources: transformer_engine.common.recipe and .pytorch of TransformerEngine 2.9 and later.
"""

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.emulate import Quantiser
from kernels.quantise import TENSOR
from kernels.quantised_linear import GemmRecipe, LinearRecipe, OperandRecipe

_NO_GPU = "only a GPU has low-precision tensor cores"
_ALIGNED = 32  # tokens: what the most demanding recipe, MXFP8, wants
# TransformerEngine's own check, and the compute capability that it asks for.
_NEEDS = {
    "DelayedScaling": ("is_fp8_available", (8, 9)),
    "Float8CurrentScaling": ("is_fp8_available", (8, 9)),
    "Float8BlockScaling": ("is_fp8_block_scaling_available", (9, 0)),
    "MXFP8BlockScaling": ("is_mxfp8_available", (10, 0)),
    "NVFP4BlockScaling": ("is_nvfp4_available", (10, 0)),
}


class Unsupported(ValueError):
    """Why a recipe or a machine has no native path."""


def recipe_of(recipe: LinearRecipe) -> tuple[str, dict[str, Any]]:
    """Return the TransformerEngine recipe that `recipe` is: the name of its class and its arguments.

    Raises:
        Unsupported: it is none of them; the message says what does not fit.
    """
    if recipe.fprop.plain:
        raise Unsupported("TransformerEngine quantises no backward pass alone")
    forward_only = recipe.dgrad.plain and recipe.wgrad.plain
    more = {"backward_override": "high_precision"} if forward_only else {}
    reasons = []
    for name, arguments, theirs in published():
        wanted = LinearRecipe(fprop=theirs.fprop) if forward_only else theirs
        different = _difference(recipe, wanted)
        if different is None:
            return name, arguments | more
        reasons.append((len(different), different))
    raise Unsupported(f"TransformerEngine has no such recipe: {min(reasons)[1]}")


def refuse_capability(recipe: LinearRecipe, capability: tuple[int, int] | None) -> None:
    """Check a recipe against the compute capability of hardware that is not at hand (None: no GPU).

    Raises:
        Unsupported: TransformerEngine has no such recipe, or the hardware no units for it.
    """
    name, _ = recipe_of(recipe)
    needed = _NEEDS[name][1]
    if capability is None:
        raise Unsupported(_NO_GPU)
    if capability < needed:
        raise Unsupported(
            f"{name} needs compute capability {needed[0]}.{needed[1]}, not {capability[0]}.{capability[1]}"
        )


def native_recipe(recipe: LinearRecipe, device: torch.device) -> Any:
    """Return `recipe` as TransformerEngine's object.

    Raises:
        Unsupported: there is none, or TransformerEngine or the hardware is missing; says which.
    """
    name, arguments = recipe_of(recipe)
    if device.type != "cuda":
        raise Unsupported(_NO_GPU)
    engine, recipes = _transformer_engine()
    if not hasattr(recipes, name):
        raise Unsupported(f"TransformerEngine {engine.__version__} has no {name}: upgrade it")
    able, why = getattr(engine, _NEEDS[name][0])(return_reason=True)
    if not able:
        major, minor = torch.cuda.get_device_capability(device)
        raise Unsupported(
            f"{torch.cuda.get_device_name(device)} (capability {major}.{minor}): {why}"
        )
    fields = recipes.__dict__[name].__dataclass_fields__
    unknown = sorted(set(arguments) - set(fields))
    if unknown:
        raise Unsupported(
            f"{name} of this TransformerEngine has no {', '.join(unknown)}: upgrade it"
        )
    if "fp8_format" in arguments:
        arguments |= {"fp8_format": getattr(recipes.Format, arguments["fp8_format"])}
    return getattr(recipes, name)(**arguments)


def native_autocast(recipe: Any) -> AbstractContextManager[Any]:
    """Return the context in which native linears compute in `recipe`, in bf16 where it is None."""
    engine, _ = _transformer_engine()
    if hasattr(engine, "autocast"):
        return engine.autocast(enabled=recipe is not None, recipe=recipe)  # type: ignore[no-any-return]
    return engine.fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe)  # type: ignore[no-any-return]


def native_linear(in_features: int, out_features: int) -> nn.Module:
    """Return TransformerEngine's linear without storage: `apply` lends it a weight."""
    engine, _ = _transformer_engine()
    linear: nn.Module = engine.Linear(
        in_features, out_features, bias=False, params_dtype=torch.float32, device="meta"
    )
    return linear


def apply(linear: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T as `linear` computes it; tokens are filled up with zeros to what FP8 GEMMs want."""
    linear._parameters["weight"] = weight  # type: ignore[assignment]  # FSDP lends a plain tensor
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = linear(F.pad(rows, (0, 0, 0, -rows.shape[0] % _ALIGNED)))
    return y[: rows.shape[0]].view(*x.shape[:-1], -1)


def self_test(recipe: Any, device: torch.device) -> None:
    """Run one product forward and backward and look at what comes back.

    Raises:
        Unsupported: an output or gradient is zero, not finite or far from that of fp32; unsupported chips
            have been seen to return zeros without a word.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(128, 128, generator=generator).to(device) for _ in range(3))
    linear, parameter = native_linear(128, 128), nn.Parameter(weight)
    x.requires_grad_()
    with torch.autocast("cuda", dtype=torch.bfloat16), native_autocast(recipe):
        y = apply(linear, x, parameter)
    torch.autograd.backward(y, grad.to(y.dtype))
    wanted = {
        "output": x @ weight.T,
        "gradient of the input": grad @ weight,
        "gradient of the weight": grad.T @ x,
    }
    for (what, right), got in zip(wanted.items(), (y, x.grad, parameter.grad), strict=True):
        assert got is not None
        error = float((got.float() - right).norm() / right.norm())
        if not error < 0.5:  # zeros have 1, NaN compares false, 4-bit rounding about 0.15
            raise Unsupported(f"self-test: the {what} is off by {error:.2f} of its norm")


@lru_cache
def _transformer_engine() -> tuple[Any, Any]:
    try:
        import transformer_engine.pytorch as engine  # noqa: PLC0415
        from transformer_engine.common import recipe as recipes  # noqa: PLC0415
    except (ImportError, RuntimeError, OSError, AssertionError) as error:
        raise Unsupported(
            f"TransformerEngine's PyTorch part is not installed (pip install espalier[te]): {error}"
        ) from error
    return engine, recipes


def published() -> list[tuple[str, dict[str, Any], LinearRecipe]]:
    """Return every recipe of TransformerEngine with the arguments that select it."""
    found: list[tuple[str, dict[str, Any], LinearRecipe]] = []
    for wide, gradient in (("HYBRID", "fp8_e5m2"), ("E4M3", "fp8_e4m3")):
        for name, scale in (("DelayedScaling", "delayed"), ("Float8CurrentScaling", "current")):
            made = _all(_fp8("fp8_e4m3", TENSOR, scale), _fp8(gradient, TENSOR, scale))
            found.append((name, {"fp8_format": wide}, made))
    for single, scale in ((False, "power_of_two"), (True, "fp32")):
        row, square = (_fp8("fp8_e4m3", block, scale) for block in ((1, 128), (128, 128)))
        made = _all(row, row, square)
        found.append(("Float8BlockScaling", {"use_f32_scales": single}, made))
    mx = OperandRecipe(quantiser=Quantiser(format="mxfp8_e4m3", block=(1, 32), scale="rceil"))
    found.append(("MXFP8BlockScaling", {"fp8_format": "E4M3"}, _all(mx, mx)))
    row, square = (
        OperandRecipe(quantiser=Quantiser(format="nvfp4", block=b)) for b in ((1, 16), (16, 16))
    )
    for no_hadamard in (False, True):
        for no_dice in (False, True):
            for no_square in (False, True):
                weight, size = row if no_square else square, 0 if no_hadamard else 16
                made = _all(row, replace(row, stochastic=not no_dice), weight, size)
                arguments = {
                    "disable_rht": no_hadamard,
                    "disable_stochastic_rounding": no_dice,
                    "disable_2d_quantization": no_square,
                }
                found.append(("NVFP4BlockScaling", arguments, made))
    return found


def _fp8(format: Any, block: tuple[int, int], scale: str) -> OperandRecipe:
    return OperandRecipe(
        quantiser=Quantiser(format=format, block=block, scale=scale), delayed=scale == "delayed"
    )


def _all(
    x: OperandRecipe, g: OperandRecipe, w: OperandRecipe | None = None, hadamard: int = 0
) -> LinearRecipe:
    w = w or x
    return LinearRecipe(
        fprop=GemmRecipe(left=x, right=w),
        dgrad=GemmRecipe(left=g, right=w),
        wgrad=GemmRecipe(left=g, right=x, hadamard=hadamard),
    )


def _difference(ours: LinearRecipe, theirs: LinearRecipe) -> str | None:
    """Return the parts in which two recipes differ, None if there is none."""
    names = {"fprop": ("x", "w"), "dgrad": ("g", "w"), "wgrad": ("g", "x")}
    found = []
    for gemm, (left, right) in names.items():
        a, b = getattr(ours, gemm), getattr(theirs, gemm)
        found += [f"{gemm}.{left}"] * (a.left != b.left) + [f"{gemm}.{right}"] * (
            a.right != b.right
        )
        found += [f"{gemm}.hadamard"] * (
            (a.hadamard, a.hadamard and a.signs) != (b.hadamard, b.hadamard and b.signs)
        )
    return ", ".join(found) or None
