"""What the Triton kernels round by: tiles, maxima, and the rounding of `kernels.formats`.

All is fp32 and integer arithmetic: fp8 and bf16 casts of Triton's interpreter are wrong.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(x, rows, cols, stride_row, stride_col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The fp32 values of this program's tile of a matrix, 0 outside."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    # 64 bits: a matrix of 2**31 elements has offsets that 32 cannot hold.
    offset = row[:, None].to(tl.int64) * stride_row + col[None, :].to(tl.int64) * stride_col
    return tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_tile(out, value, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Write this program's tile of a contiguous matrix."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    tl.store(out + row[:, None].to(tl.int64) * cols + col[None, :], value, mask=inside)


@triton.jit
def store_turned(out, value, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Write this program's tile of a `rows` x `cols` matrix into its contiguous transpose."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (col[:, None] < cols) & (row[None, :] < rows)
    place = col[:, None].to(tl.int64) * rows + row[None, :]
    tl.store(out + place, tl.trans(value), mask=inside)


@triton.jit
def largest_magnitude(value):
    """The largest magnitude; NaN if there is one, which `tl.max` alone would pass over."""
    has_nan = tl.max(tl.max((value != value).to(tl.int32), axis=1), axis=0)
    largest = tl.max(tl.max(tl.abs(value), axis=1), axis=0)
    return tl.where(has_nan > 0, float("nan"), largest)


@triton.jit
def round_bf16(value):
    """fp32 rounded to bf16, nearest even; NaN stays."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(value != value, value, rounded.to(tl.float32, bitcast=True))


@triton.jit
def bf16_bits(x):
    """The upper half of fp32 numbers that are exact in bf16, as int16."""
    return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16)


@triton.jit
def clip(x, MAX: tl.constexpr):
    """Clamped to [-MAX, MAX]; NaN stays."""
    return tl.where(x != x, x, tl.minimum(tl.maximum(x, -MAX), MAX))


@triton.jit
def power_of_two_down(x):
    """2**floor(log2 x) of positive normal numbers."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def power_of_two_up(x):
    """2**ceil(log2 x) of positive normal numbers."""
    down = power_of_two_down(x)
    return tl.where(down == x, down, down * 2.0)


@triton.jit
def nearest(x, EMIN: tl.constexpr, MANTISSA: tl.constexpr):
    """Round to a format with this smallest exponent and mantissa, ties to even."""
    least: tl.constexpr = (127 + EMIN) << 23
    power = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, least)
    step_bits = power - (MANTISSA << 23)
    step = step_bits.to(tl.float32, bitcast=True)
    scaled = x * inverse(step)
    # Adding 1.5 * 2**23 leaves no bit behind the point: the sum is rounded to nearest even.
    return ((scaled + 12582912.0) - 12582912.0) * step


@triton.jit
def inverse(power):
    """1 / 2**k exactly: the exponent mirrored at its bias."""
    return (0x7F000000 - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def stochastic_e2m1(x, bits):
    """Rounded up or down to E2M1 by a random byte, as `round_stochastic_e2m1`."""
    magnitude = tl.abs(x)
    t = magnitude + bits * (1.0 / 256.0) * _e2m1_step(magnitude)
    step = _e2m1_step(t)
    element = tl.floor(t * inverse(step)) * step
    element = tl.where(element > 6.0, 6.0, element)  # NaN stays
    return tl.where(x < 0, -element, element)


@triton.jit
def _e2m1_step(magnitude):
    return tl.where(magnitude < 2.0, 0.5, tl.where(magnitude < 4.0, 1.0, 2.0))


@triton.jit
def e4m3_byte(scale):
    """The byte of a value of E4M3 that is not negative; NaN is 0x7F."""
    normal = (scale.to(tl.int32, bitcast=True) >> 20) - 960
    code = tl.where(scale < 0.015625, (scale * 512.0).to(tl.int32), normal)
    return tl.where(scale == scale, code, 0x7F)


@triton.jit
def float8_byte(element, EMIN: tl.constexpr, MANTISSA: tl.constexpr):
    """The byte of a value of the FP8 format with this smallest exponent and mantissa."""
    bits = element.to(tl.int32, bitcast=True)
    magnitude = tl.abs(element)
    normal = ((bits & 0x7FFFFFFF) >> (23 - MANTISSA)) - ((126 + EMIN) << MANTISSA)
    least: tl.constexpr = 2.0**EMIN
    unit: tl.constexpr = 2.0 ** (MANTISSA - EMIN)
    code = tl.where(magnitude < least, (magnitude * unit).to(tl.int32), normal)
    code = tl.where(element == element, code, 0x7F)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def e2m1_codes(element, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The codes of a tile of E2M1, two neighbours of a row in a byte, the first in the low half."""
    bits = element.to(tl.int32, bitcast=True)
    # Exponent and first bit of the mantissa count as codes do, but for 0 and 0.5.
    code = ((bits & 0x7FFFFFFF) >> 22) - 252
    code = tl.where(code < 0, 0, tl.maximum(code, 1)) | ((bits >> 28) & 8)
    low, high = tl.split(tl.reshape(code, (ROWS, COLS // 2, 2)))
    return (low | (high << 4)).to(tl.uint8)


@triton.jit
def e8m0_byte(scale):
    """The byte of a power of two: 0 of 0 and 2**-127, 255 where it is not finite."""
    return (scale.to(tl.int32, bitcast=True) >> 23) & 0xFF


@triton.jit
def store_scales(scales, value, rows, cols, R: tl.constexpr, C: tl.constexpr):
    """Store the scales of a program's blocks, `rows` x `cols` being those of the matrix."""
    row = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    col = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    tl.store(scales + row.to(tl.int64) * cols + col, value, mask=(row < rows) & (col < cols))
