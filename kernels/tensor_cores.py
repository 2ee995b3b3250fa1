"""Which recipes `torch._scaled_mm` multiplies on low-precision tensor cores."""

import torch

from kernels import block_scaled_mm, float8_mm
from kernels.format_names import Format
from kernels.gemm_recipes import GemmRecipe, LinearRecipe
from kernels.operands import fits_float8


def passed_over(recipe: LinearRecipe, device: torch.device) -> str | None:
    """Return why `torch._scaled_mm` does not multiply `recipe` on `device`, None if it does."""
    if fits_float8(recipe):
        return float8_mm.passed_over(device)
    formats = formats_of_blocks(recipe)
    if not formats:
        return (
            "torch._scaled_mm multiplies FP8 with scales of tensors, NVFP4, MXFP4 and MXFP8, both "
            "operands in one format"
        )
    reasons = (block_scaled_mm.passed_over(device, format) for format in sorted(formats))
    return next((reason for reason in reasons if reason is not None), None)


def formats_of_blocks(recipe: LinearRecipe) -> set[Format]:
    """Return the formats that `kernels.block_scaled_mm` multiplies every quantised GEMM in.

    Empty if there is none, or one of other operands. A GEMM in bf16 stays there.
    """
    formats: set[Format] = set()
    for gemm in (recipe.fprop, recipe.dgrad, recipe.wgrad):
        if gemm.left is None and gemm.right is None:
            continue
        format = _format(gemm)
        if format is None:
            return set()
        formats.add(format)
    return formats


def _format(gemm: GemmRecipe) -> Format | None:
    """Return the one format of both operands if it is of blocks along the sum, else None."""
    if gemm.left is None or gemm.right is None:
        return None
    left, right = gemm.left.quantiser, gemm.right.quantiser
    size = block_scaled_mm.BLOCKS.get(left.format)
    fits = all(q.block[1] == size and q.apart is None for q in (left, right))
    return left.format if fits and left.format == right.format else None
