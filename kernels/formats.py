"""Small floating-point formats to the last bit: their values, rounding to them, their codes.

Rounding is arithmetic on fp32, so that eager torch, torch.compile and Triton (whose interpreter has
wrong fp8 casts) give the same bits. Values are fp32; `encode` and `decode` convert to and from the
bytes that hardware stores.

Sources: OCP Microscaling Formats v1.0 (E2M1, E8M0), OCP FP8 (E4M3, E5M2); E1M2, the integers to 7
and their negatives, arXiv 2606.20381.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


def quotient(x: Tensor | float, y: Tensor | float) -> Float[Tensor, "..."]:
    """Return x / y rounded once on every device, where one of both is a number.

    For a tensor / number CUDA multiplies by the number's reciprocal, and for a number / tensor
    torch by the tensor's: two roundings.
    """
    if isinstance(x, Tensor):
        return torch.div(x, y if isinstance(y, Tensor) else x.new_full((), y))
    assert isinstance(y, Tensor)
    return torch.div(y.new_full((), x), y)


@dataclass(frozen=True)
class FloatFormat:
    """A signed format with subnormals and without infinities in use: rounding saturates.

    Args:
        mantissa: stored bits of the significand.
        emin, emax: exponents of the smallest and of the largest normal number.
        max: largest finite value.
    """

    name: str
    mantissa: int
    emin: int
    emax: int
    max: float


E2M1 = FloatFormat("e2m1", mantissa=1, emin=0, emax=2, max=6.0)
E4M3 = FloatFormat("e4m3", mantissa=3, emin=-6, emax=8, max=448.0)
E5M2 = FloatFormat("e5m2", mantissa=2, emin=-14, emax=15, max=57344.0)
E1M2 = FloatFormat("e1m2", mantissa=2, emin=2, emax=2, max=7.0)  # 0, 1, ..., 7
FORMATS = {f.name: f for f in (E2M1, E4M3, E5M2, E1M2)}

_FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_EXPONENT_BITS = 0x7F800000
_MIRROR = 0x7F000000  # bits(2**k) + bits(2**-k)
_E8M0_NAN = 255


def round_nearest(x: Float[Tensor, "*shape"], fmt: FloatFormat) -> Float[Tensor, "*shape"]:
    """Return fp32 `x` rounded to `fmt`, ties to the even code; beyond `fmt.max` it saturates.

    NaN stays. Error: at most half a step, which is 2**(exponent - mantissa) of the value's binade.
    """
    x = x.clamp(-fmt.max, fmt.max)
    step = _step(x, fmt)
    return torch.round(x * _inverse(step)) * step


def round_stochastic_e2m1(
    x: Float[Tensor, "*shape"], bits: UInt8[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Return fp32 `x` rounded up or down to E2M1, with `bits` / 256 in [0, 1) as the dice.

    It is Blackwell's cvt.rs as TransformerEngine states it: t = |x| + u * step(|x|), truncated to
    the step of t. Unbiased to 1/256 of a step for |x| <= 6; above, it saturates.
    """
    magnitude = x.abs()
    t = magnitude + bits.float() * (1.0 / 256.0) * _e2m1_step(magnitude)
    step = _e2m1_step(t)
    q = (torch.floor(t * _inverse(step)) * step).clamp(max=E2M1.max)
    return torch.where(x < 0, -q, q)


def round_stochastic(
    x: Float[Tensor, "*shape"], dice: Float[Tensor, "*shape"], fmt: FloatFormat
) -> Float[Tensor, "*shape"]:
    """Return fp32 `x` rounded up with the probability of its distance from the value below.

    `dice` are uniform in [0, 1). Unbiased to their resolution for |x| <= fmt.max; above, it
    saturates.
    """
    step = _step(x, fmt)
    q = (torch.floor(x.abs() * _inverse(step) + dice) * step).clamp(max=fmt.max)
    return torch.where(x < 0, -q, q)


def round_scale(
    amax: Float[Tensor, "*shape"], fmt: FloatFormat, mode: str
) -> Float[Tensor, "*shape"]:
    """Return the power-of-two scale, in fp32, of blocks whose largest magnitude is `amax`.

    Blocks of zeros have the scale 0.

    Args:
        mode: floor: 2**(floor(log2 amax) - emax), as OCP says; rceil: amax / fmt.max rounded up to
            a power of two, which never saturates (NVIDIA's training); ceil: 2**(ceil(log2 amax) -
            emax); even: as floor, amax being rounded to the format's mantissa first.

    Raises:
        ValueError: there is no such mode.
    """
    if mode == "rceil":
        scale = amax * amax.new_full((), fmt.max).reciprocal()
        scale = _power_of_two_up(scale)
    elif mode == "ceil":
        scale = _power_of_two_up(amax) * 2.0**-fmt.emax
    elif mode == "floor":
        scale = _power_of_two_down(amax) * 2.0**-fmt.emax
    elif mode == "even":
        # Half of the last stored bit is added: what rounds up to the next binade gets its exponent.
        half = 1 << (23 - fmt.mantissa - 1)
        rounded = (amax.view(torch.int32) + half).view(torch.float32)
        scale = _power_of_two_down(rounded) * 2.0**-fmt.emax
    else:
        raise ValueError(f"scale rounding {mode!r} is none of floor, rceil, ceil, even")
    smallest = 2.0**-127  # E8M0's, a subnormal of fp32
    return torch.where(amax > 0, scale.clamp(min=smallest), torch.zeros_like(scale))


def encode(values: Float[Tensor, "*shape"], fmt: FloatFormat) -> UInt8[Tensor, "*shape"]:
    """Return the codes of `values`, each a value of `fmt`; four bits lie in the low nibble."""
    if fmt.name in _FLOAT8:
        return values.to(_FLOAT8[fmt.name]).view(torch.uint8)
    values = values.to(torch.bfloat16)
    if fmt is E2M1:
        # Of the bits of bf16 the exponent and the first of the mantissa count from 1 upwards as
        # codes do; 0.5 is one lower, and 0 far below.
        code = ((values.view(torch.int16) & 0x7FFF) >> 6) - 252
        code = (code + (code <= 0)).clamp(min=0)
    else:
        code = values.abs()
    return code.to(torch.uint8) | (torch.signbit(values).to(torch.uint8) << 3)


def decode(codes: UInt8[Tensor, "*shape"], fmt: FloatFormat) -> Float[Tensor, "*shape"]:
    """Return the fp32 values of `codes`."""
    if fmt.name in _FLOAT8:
        return codes.view(_FLOAT8[fmt.name]).float()
    magnitudes = torch.arange(8, device=codes.device)
    if fmt is E2M1:  # a table of numbers would be copied to a GPU at every call, with a wait
        mantissa, exponent = magnitudes & 1, magnitudes >> 1
        quarters = torch.where(exponent == 0, 2 * mantissa, (2 + mantissa) << exponent)
        magnitudes = quarters * 0.25
    magnitudes = magnitudes.float()
    return torch.cat((magnitudes, -magnitudes))[codes.long()]


def encode_positive_e4m3(scales: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Return the bytes of `scales` (fp32, each a value of E4M3 and none negative); NaN is 0x7F."""
    normal = (scales.view(torch.int32) >> 20) - (120 << 3)
    code = torch.where(scales < 2.0**E4M3.emin, (scales * 512.0).to(torch.int32), normal)
    return torch.where(scales.isnan(), 0x7F, code).to(torch.uint8)


def encode_e8m0(scales: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Return the exponent bytes of power-of-two `scales`; 0 and 2**-127 are byte 0, NaN is 255."""
    exponent = ((scales.view(torch.int32) & _EXPONENT_BITS) >> 23).to(torch.uint8)
    return torch.where(scales.isfinite(), exponent, _E8M0_NAN)


def decode_e8m0(codes: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return 2**(code - 127), NaN for 255, in fp32."""
    values = torch.ldexp(torch.ones(codes.shape, device=codes.device), codes.int() - 127)
    return torch.where(codes == _E8M0_NAN, torch.nan, values)


def pack(codes: UInt8[Tensor, "*rows cols"]) -> UInt8[Tensor, "*rows half"]:
    """Return two four-bit codes a byte along the last dimension, the first in the low nibble.

    Raises:
        ValueError: the last dimension is odd.
    """
    if codes.shape[-1] % 2:
        raise ValueError(
            f"cols={codes.shape[-1]} must be even to pack two codes a byte; pad by one"
        )
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack(packed: UInt8[Tensor, "*rows half"]) -> UInt8[Tensor, "*rows cols"]:
    """Return the four-bit codes of `pack`."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def _step(x: Tensor, fmt: FloatFormat) -> Tensor:
    """Return the distance between neighbours of `fmt` in the binade of each |x|."""
    return _power_of_two_down(x.abs()).clamp(min=2.0**fmt.emin) * 2.0**-fmt.mantissa


def _inverse(power: Tensor) -> Tensor:
    """Return 1 / 2**k exactly and without a division: the exponent mirrored at its bias."""
    return (_MIRROR - power.view(torch.int32)).view(torch.float32)


def _e2m1_step(magnitude: Tensor) -> Tensor:
    return torch.where(magnitude < 2.0, 0.5, torch.where(magnitude < 4.0, 1.0, 2.0))


def _power_of_two_down(x: Tensor) -> Tensor:
    """Return 2**floor(log2 x) of positive normal fp32 numbers: their bits without the mantissa."""
    return (x.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)


def _power_of_two_up(x: Tensor) -> Tensor:
    down = _power_of_two_down(x)
    return torch.where(down == x, down, down * 2.0)
