"""Linear layers on low-precision tensor cores, through TransformerEngine where both are there.

TransformerEngine knows five recipes, each for all three GEMMs of a layer; a `LinearRecipe` that is
one of them can run there. Other than in the emulation, accumulation is the hardware's, gradients of
weights leave their GEMM in bf16, and stochastic rounding draws from torch's CUDA generator, which
`seed_dice` sets.

Sources: transformer_engine.common.recipe and .pytorch of TransformerEngine 2.9 and later.
"""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.gemm_recipes import GemmRecipe, LinearRecipe, OperandRecipe
from kernels.quantise import TENSOR, Block, E4M3Max
from kernels.quantiser import Quantiser

_NO_GPU = "only a GPU has low-precision tensor cores"
_ALIGNED = 32  # tokens are padded to a multiple: MXFP8's, the largest of any recipe
# TransformerEngine's own check, and the compute capability that it requires.
_NEEDS = {
    "DelayedScaling": ("is_fp8_available", (8, 9)),
    "Float8CurrentScaling": ("is_fp8_available", (8, 9)),
    "Float8BlockScaling": ("is_fp8_block_scaling_available", (9, 0)),
    "MXFP8BlockScaling": ("is_mxfp8_available", (10, 0)),
    "NVFP4BlockScaling": ("is_nvfp4_available", (10, 0)),
}


# TransformerEngine's backward passes in bf16: of the original operands, or of those of the forward
# pass, dequantised.
_OVERRIDES = {"high_precision": GemmRecipe(), "dequantized": GemmRecipe(dequantised=True)}


class Unsupported(ValueError):
    """A recipe or a machine has no native path; the message says why."""


def recipe_of(recipe: LinearRecipe) -> tuple[str, dict[str, Any]]:
    """Return the TransformerEngine recipe equal to `recipe`: the name of its class, its arguments.

    Raises:
        Unsupported: there is none; the message names the operands that differ from the nearest.
    """
    if recipe.fprop.plain:
        raise Unsupported("TransformerEngine quantises no backward pass alone")
    override = _override(recipe)
    differences = []
    for name, arguments, theirs in published():
        if override is not None:
            backward = _OVERRIDES[override]
            theirs = replace(theirs, dgrad=backward, wgrad=backward)
        difference = _difference(recipe, theirs)
        if difference is None and override is not None and name == "DelayedScaling":
            raise Unsupported("DelayedScaling quantises the backward pass too")
        if difference is None:
            return name, arguments | ({"backward_override": override} if override else {})
        differences.append((len(difference), difference))
    raise Unsupported(f"TransformerEngine has no such recipe: {min(differences)[1]}")


def _override(recipe: LinearRecipe) -> str | None:
    """Return TransformerEngine's word for a backward pass in bf16, None where it quantises."""
    backward = (recipe.dgrad, recipe.wgrad)
    if any(operand is not None for gemm in backward for operand in (gemm.left, gemm.right)):
        return None
    kept = {gemm.dequantised for gemm in backward}
    words = [word for word, gemm in _OVERRIDES.items() if kept == {gemm.dequantised}]
    return words[0] if words else None


def refuse_capability(recipe: LinearRecipe, capability: tuple[int, int] | None) -> None:
    """Refuse a recipe that hardware of this compute capability (None: no GPU) has no units for.

    Raises:
        Unsupported: TransformerEngine has no such recipe, or the hardware no units for it.
    """
    name, _ = recipe_of(recipe)
    needed = _NEEDS[name][1]
    if capability is None:
        raise Unsupported(_NO_GPU)
    if capability < needed:
        least, given = (f"{major}.{minor}" for major, minor in (needed, capability))
        raise Unsupported(f"{name} needs compute capability {least}, not {given}")


def native_recipe(recipe: LinearRecipe, device: torch.device) -> Any:
    """Return `recipe` as TransformerEngine's object, tested by one product on `device`.

    Raises:
        Unsupported: there is none, TransformerEngine or the hardware is missing, or the test failed
            in whatever way.
    """
    try:
        native = _make_recipe(recipe, device)
        _self_test(native, device)
    except Unsupported:
        raise
    except Exception as error:  # an engine that cannot start is passed over, whatever it raises
        first = str(error).partition("\n")[0]
        raise Unsupported(f"TransformerEngine failed: {type(error).__name__}: {first}") from error
    return native


def _make_recipe(recipe: LinearRecipe, device: torch.device) -> Any:
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


@contextmanager
def _both(
    first: AbstractContextManager[Any], second: AbstractContextManager[Any]
) -> Iterator[None]:
    with first, second:
        yield


def recompute_contexts(
    recipe: Any,
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of a forward pass that keeps no activations, and of its repetition.

    The repetition is part of the backward pass, outside of `native_autocast`, and enters it again.
    The engine's own contexts keep the scales of delayed scaling for it.
    """
    engine, _ = _transformer_engine()
    forward, again = engine.distributed.get_activation_recompute_contexts()
    return forward, _both(again, native_autocast(recipe))


def seed_dice(seed: int, rank: int, step: int) -> None:
    """Set the generator of stochastic rounding for a step: other bits for each argument."""
    digest = hashlib.sha256(f"{seed} {rank} {step}".encode()).digest()
    torch.cuda.manual_seed(int.from_bytes(digest[:8]) >> 1)  # a positive int64


def native_linear(in_features: int, out_features: int) -> nn.Module:
    """Return TransformerEngine's linear without storage; `apply` gives it its weight."""
    engine, _ = _transformer_engine()
    linear: nn.Module = engine.Linear(
        in_features, out_features, bias=False, params_dtype=torch.float32, device="meta"
    )
    return linear


def apply(linear: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T as `linear` computes it; tokens are padded with zeros for its GEMMs.

    `x` is made bf16: the engine casts nothing that it quantises, and refuses a Hadamard transform
    of fp32.
    """
    linear._parameters["weight"] = weight  # type: ignore[assignment]  # FSDP lends a plain tensor
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    y: Tensor = linear(F.pad(rows, (0, 0, 0, -rows.shape[0] % _ALIGNED)))
    return y[: rows.shape[0]].view(*x.shape[:-1], -1)


def _self_test(recipe: Any, device: torch.device) -> None:
    """Check one product and its gradients against fp32: an unsupported chip may return zeros.

    Raises:
        Unsupported: an output or gradient is zero, not finite or off by half of its norm.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(128, 128, generator=generator).to(device) for _ in range(3))
    linear, parameter = native_linear(128, 128), nn.Parameter(weight)
    x.requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16), native_autocast(recipe):
        y = apply(linear, x, parameter)
    torch.autograd.backward(y, grad.to(y.dtype))
    expected = {
        "output": x @ weight.T,
        "gradient of the input": grad @ weight,
        "gradient of the weight": grad.T @ x,
    }
    computed = (y, x.grad, parameter.grad)
    for (name, exact), tensor in zip(expected.items(), computed, strict=True):
        assert tensor is not None
        error = float(((tensor.float() - exact).norm() / exact.norm()).detach())
        if not error < 0.5:  # zeros have 1, NaN compares false, 4-bit rounding about 0.15
            raise Unsupported(f"self-test: the {name} is off by {error:.2f} of its norm")


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
    """Return every recipe of TransformerEngine: the name of its class, its arguments, as ours."""
    recipes: list[tuple[str, dict[str, Any], LinearRecipe]] = []
    for wide, gradient in (("HYBRID", "fp8_e5m2"), ("E4M3", "fp8_e4m3")):
        for name, scale in (("DelayedScaling", "delayed"), ("Float8CurrentScaling", "current")):
            recipe = _all(_fp8("fp8_e4m3", TENSOR, scale), _fp8(gradient, TENSOR, scale))
            recipes.append((name, {"fp8_format": wide}, recipe))
    for single, scale in ((False, "power_of_two"), (True, "fp32")):
        row, square = (_fp8("fp8_e4m3", block, scale) for block in ((1, 128), (128, 128)))
        recipe = _all(row, row, square)
        recipes.append(("Float8BlockScaling", {"use_f32_scales": single}, recipe))
    mx = OperandRecipe(quantiser=Quantiser(format="mxfp8_e4m3", block=(1, 32), scale="rceil"))
    recipes.append(("MXFP8BlockScaling", {"fp8_format": "E4M3"}, _all(mx, mx)))
    return recipes + _nvfp4()


def _nvfp4() -> list[tuple[str, dict[str, Any], LinearRecipe]]:
    """Return every NVFP4 recipe of TransformerEngine.

    It transforms no operand that it quantises by four over six, rounds none of them by dice, and
    has row-scaled activations in the forward pass only.
    """
    recipes = []
    largest: tuple[E4M3Max, ...] = (448, 256)
    chosen: list[tuple[str, E4M3Max]] = [("", 448), *product(("mae", "mse"), largest)]
    for no_hadamard, no_dice, no_square in product((False, True), repeat=3):
        for weights, activations, rows in product(chosen, chosen, (False, True)):
            together = {error for error, _ in (weights, activations) if error}
            if len(together) == 2 or (activations[0] and not no_hadamard):
                continue
            x = _nvfp4_operand((1, 16), *activations, row_scaled=rows)
            g = replace(_nvfp4_operand((1, 16)), stochastic=not no_dice)
            w = _nvfp4_operand((1, 16) if no_square else (16, 16), *weights)
            recipe = _all(x, g, w, 0 if no_hadamard else 16)
            arguments = {
                "disable_rht": no_hadamard,
                "disable_stochastic_rounding": no_dice,
                "disable_2d_quantization": no_square,
            }
            if together:
                arguments |= _four_over_six(weights, activations, together.pop())
            if rows:
                arguments |= {"row_scaled_activation": True}
                recipe = LinearRecipe(fprop=recipe.fprop)
            recipes.append(("NVFP4BlockScaling", arguments, recipe))
    return recipes


def _nvfp4_operand(
    block: Block, error: str = "", largest: E4M3Max = 448, *, row_scaled: bool = False
) -> OperandRecipe:
    return OperandRecipe(
        quantiser=Quantiser(
            format="nvfp4",
            block=block,
            four_over_six=error,
            e4m3_max=largest,
            row_scaled=row_scaled,
        )
    )


def _four_over_six(
    weights: tuple[str, int], activations: tuple[str, int], error: str
) -> dict[str, Any]:
    """Return the arguments that choose (error, largest scale) for weights and activations."""
    chosen = {"weights": weights, "activations": activations}
    scopes = [name for name, (own, _) in chosen.items() if own]
    wide = [name for name in scopes if chosen[name][1] == 256]
    return {
        "nvfp4_4over6": _scope(scopes),
        "nvfp4_4over6_e4m3_use_256": _scope(wide) if len(wide) < len(scopes) else "all",
        "nvfp4_4over6_err_mode": error.upper(),
    }


def _scope(names: list[str]) -> str:
    return "all" if len(names) == 2 else names[0] if names else "none"


def _fp8(format: Any, block: tuple[int, int], scale: str) -> OperandRecipe:
    return OperandRecipe(
        quantiser=Quantiser(format=format, block=block, scale=scale), delayed=scale == "delayed"
    )


def _all(
    x: OperandRecipe, g: OperandRecipe, w: OperandRecipe | None = None, hadamard: int = 0
) -> LinearRecipe:
    """Return the recipe with these operands (activations, gradients, weights: None, as `x`)."""
    w = w or x
    return LinearRecipe(
        fprop=GemmRecipe(left=x, right=w),
        dgrad=GemmRecipe(left=g, right=w),
        wgrad=GemmRecipe(left=g, right=x, hadamard=hadamard),
    )


def _difference(ours: LinearRecipe, theirs: LinearRecipe) -> str | None:
    """Return the names of the parts in which two recipes differ, None if there is none."""
    operands = {"fprop": ("x", "w"), "dgrad": ("g", "w"), "wgrad": ("g", "x")}
    parts = []
    for gemm, (left, right) in operands.items():
        a, b = getattr(ours, gemm), getattr(theirs, gemm)
        if a.left != b.left:
            parts.append(f"{gemm}.{left}")
        if a.right != b.right:
            parts.append(f"{gemm}.{right}")
        if (a.hadamard, a.hadamard and a.signs) != (b.hadamard, b.hadamard and b.signs):
            parts.append(f"{gemm}.hadamard")
        if a.dequantised != b.dequantised:
            parts.append(f"{gemm}.saved")
    return ", ".join(parts) or None
