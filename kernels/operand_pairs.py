"""Two operands from one read of a matrix: along its rows, and down its columns.

On a GPU NVFP4 of a gradient, or of an input of which the second is kept as codes for the backward
pass; on FP8 tensor cores one with the scale of the tensor, laid out for either sum.

Shape legend: rows, cols of the matrix; d = size of a Hadamard transform.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.codes import Codes, unpack_operand
from kernels.emulate import Operand, address, draw_at, emulate, has_triton
from kernels.float8_mm import FORMATS
from kernels.formats import E4M3, decode
from kernels.hadamard import hadamard, hadamard_matrix
from kernels.philox import Dice, Draw
from kernels.quantiser import Quantiser
from kernels.triton_check import triton_agrees

# Sizes of the transform that one kernel makes beside quantising; at 128 its code has 300 KiB.
FUSED_HADAMARD = (16, 32, 64)


def fusible(x: Tensor, quantiser: Quantiser, hadamard: int) -> bool:
    """Return whether `emulate_both` computes this quantiser on the device of `x`.

    Args:
        hadamard: size of the transform, 0: none.
    """
    fits = quantiser.simple_nvfp4 and quantiser.block == (1, 16) and x.shape[1] % 16 == 0
    return fits and hadamard in (0, *FUSED_HADAMARD) and _has_kernels(x.device)


# A constant: torch.compile would trace the comparison.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_kernels(device: torch.device) -> bool:
    return has_triton(device) and triton_agrees(device, _compare)


def _compare(device: torch.device) -> None:
    """Raise ValueError where a kernel differs from `emulate`, which makes one at a time."""
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    quantiser, matrix = Quantiser(format="nvfp4", block=(1, 16)), hadamard_matrix(16, device=device)
    dice = Dice(torch.arange(2, device=device), torch.arange(2, device=device).int())
    draws = Draw(dice, 1, 64), Draw(dice, 2, 64)
    along, across = emulate_both(x, quantiser, matrix, draws)
    _, codes = emulate_kept(x, quantiser, matrix, draws)
    turned = emulate(hadamard(x, matrix, 0), quantiser, 0, draw=draws[1])
    kept = unpack_operand(codes, quantiser.along(0))
    fp8 = Quantiser(format="fp8_e4m3", block=(0, 0))
    (columns,) = float8_operands(x, fp8, (0,), None)
    float8 = decode(columns.values.T.view(torch.uint8), E4M3).T
    pairs = (
        (along.values, emulate(x, quantiser, 1, draw=draws[0]).values),
        (across.values, turned.values),
        (kept.values, turned.values),
        (float8, emulate(x, fp8, 1).values.float()),
    )
    for found, wanted in pairs:
        if not torch.equal(found, wanted):
            raise ValueError("two operands at once differ from one and one")


def emulate_both(
    x: Float[Tensor, "rows cols"],
    quantiser: Quantiser,
    matrix: Float[Tensor, "d d"] | None,
    draws: tuple[Draw, Draw] | None,
) -> tuple[Operand, Operand]:
    """Return two operands from one read of `x`, bit for bit those of two calls of `emulate`.

    The first is `x`, summed over its columns; the second its Hadamard transform by `matrix` (None:
    `x` itself), summed over its rows. Call it only where `fusible`.
    """
    made = _both(x, quantiser, matrix, draws, keep=False)
    rows, columns = (
        Operand(values, numerator, quantiser.denominator, folded=folded)
        for values, numerator, folded in (made[:3], made[3:])
    )
    return rows, columns


def emulate_kept(
    x: Float[Tensor, "rows cols"],
    quantiser: Quantiser,
    matrix: Float[Tensor, "d d"] | None,
    draws: tuple[Draw, Draw] | None,
) -> tuple[Operand, Codes]:
    """Return `emulate_both`, the second as `kernels.codes.pack_operand` keeps it."""
    made = _both(x, quantiser, matrix, draws, keep=True)
    rows = Operand(made[0], made[1], quantiser.denominator, folded=made[2])
    return rows, (made[3], made[4], None, made[5])


def float8_operands(
    x: Float[Tensor, "rows cols"],
    quantiser: Quantiser,
    dims: tuple[int, ...],
    amax: Float[Tensor, ""] | None,
) -> list[Operand]:
    """Return `x` in float8 for a sum over each of `dims`, as `kernels.float8_mm` reads it.

    Values summed over columns lie row by row in memory, those summed over rows column by column.

    Args:
        quantiser: FP8 with one scale of the tensor.
        amax: the magnitude that its scale stands for, None that of `x`.
    """
    rows, columns, numerator = torch.ops.espalier.quantise_float8(
        x, amax, quantiser.format, 1 in dims, 0 in dims
    )
    return [Operand(rows if dim == 1 else columns.T, numerator) for dim in dims]


def _both(
    x: Tensor,
    quantiser: Quantiser,
    matrix: Tensor | None,
    draws: tuple[Draw, Draw] | None,
    *,
    keep: bool,
) -> tuple[Tensor, ...]:
    one, two = draws or (None, None)
    made: tuple[Tensor, ...] = torch.ops.espalier.quantise_both(
        x, matrix, *address(one), 0 if two is None else two.stream, quantiser.sr_headroom, keep
    )
    return made


@torch.library.custom_op("espalier::quantise_both", mutates_args=())
def _quantise_both(
    x: Tensor,
    matrix: Tensor | None,
    samples: Tensor | None,
    key: Tensor | None,
    stream: int,
    tokens: int,
    stream_turned: int,
    sr_headroom: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from kernels import triton_nvfp4  # noqa: PLC0415

    draw = draw_at(samples, key, stream, tokens)
    draws = None if draw is None else (draw, Draw(draw.dice, stream_turned, tokens))
    rows, columns = triton_nvfp4.quantise_both(x, matrix, draws, headroom=sr_headroom, keep=keep)
    return *rows, *columns


@_quantise_both.register_fake
def _(
    x: Tensor,
    matrix: Tensor | None,
    samples: Tensor | None,
    key: Tensor | None,
    stream: int,
    tokens: int,
    stream_turned: int,
    sr_headroom: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (rows, cols), made = x.shape, []
    for folded in ((rows, cols // 16), (rows // 16, cols)):
        values = x.new_empty(rows, cols, dtype=torch.bfloat16)
        made += [values, x.new_empty(()).float(), x.new_empty(folded, dtype=torch.uint8)]
    kept = x.new_empty(rows, cols // 2, dtype=torch.uint8) if keep else made[3]
    return made[0], made[1], made[2], kept, made[4], made[5]


@torch.library.custom_op("espalier::quantise_float8", mutates_args=())
def _quantise_float8(
    x: Tensor, amax: Tensor | None, format: str, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    quantiser = Quantiser(format=format, block=(0, 0))  # type: ignore[arg-type]
    dtype, none = FORMATS[format], x.new_empty(0, 0).to(FORMATS[format])
    if has_triton(x.device):  # `_has_kernels` would not do: it calls this function
        from kernels import triton_blocks  # noqa: PLC0415

        along, across, numerator = triton_blocks.quantise_float8(
            x, quantiser.elements, amax, rows=rows, columns=columns
        )
        return along.view(dtype), across.view(dtype), numerator
    made = emulate(x, quantiser, 1, amax=amax)
    assert made.numerator is not None
    values = made.values.to(dtype)
    turned = values.view(torch.uint8).T.contiguous().view(dtype) if columns else none
    return values if rows else none, turned, made.numerator


@_quantise_float8.register_fake
def _(
    x: Tensor, amax: Tensor | None, format: str, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = FORMATS[format]
    along = x.new_empty(x.shape if rows else (0, 0), dtype=dtype)
    across = x.new_empty(x.T.shape if columns else (0, 0), dtype=dtype)
    return along, across, x.new_empty((), dtype=torch.float32)
