"""What quantising does to a tensor, in numbers: what to look at when a low-precision run goes wrong.

Each is a pass over the tensor by the eager reference: for a look every so many steps, not for every one.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.emulate import Quantiser
from kernels.quantise import Quantised, as_blocks


def statistics(
    x: Float[Tensor, "rows cols"],
    found: Quantised,
    before: Float[Tensor, "rows cols"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Return 0-d tensors that describe `found`, which `x` was quantised to.

    amax            largest magnitude
    sqnr_db         10 log10 (signal / error energy)
    underflow       share of the non-zero elements that became 0
    saturation      share beyond what their block's scale can hold
    zero_scales     share of blocks whose scale is 0
    scale_log2_K    share of blocks whose scale lies in [2^K, 2^(K+1)): their histogram, no empty bins
    bias            mean of sign(x) (found - x) over mean |x|: what stochastic rounding is to bring to 0
    kurtosis        E x^4 / (E x^2)^2, 3 for a Gaussian
    kurtosis_gain   that of `before` (the tensor without its Hadamard transform) over it
    """
    x = x.float()
    values = found.dequantise()
    error = values - x
    scale = found.scales * found.outer if found.outer.ndim == 0 else found.scales
    live = found.scales[found.scales > 0].log2().floor()
    octaves, counts = torch.unique(live, return_counts=True)  # type: ignore[no-untyped-call]
    result = {
        "amax": x.abs().amax(),
        "sqnr_db": 10 * torch.log10(x.square().sum() / error.square().sum().clamp(min=1e-30)),
        "underflow": ((values == 0) & (x != 0)).sum() / (x != 0).sum().clamp(min=1),
        "saturation": (x.abs() > _reach(found, scale, x)).float().mean(),
        "zero_scales": (found.scales == 0).float().mean(),
        "bias": (x.sign() * error).mean() / x.abs().mean().clamp(min=1e-30),
        "kurtosis": kurtosis(x),
    }
    shares = counts / found.scales.numel()
    result |= {f"scale_log2_{int(k)}": share for k, share in zip(octaves, shares, strict=True)}
    if before is not None:
        result["kurtosis_gain"] = kurtosis(before.float()) / result["kurtosis"]
    return result


def kurtosis(x: Float[Tensor, "rows cols"]) -> Float[Tensor, ""]:
    """Return E x^4 / (E x^2)^2."""
    square = x.square()
    return square.square().mean() / square.mean().square().clamp(min=1e-30)


def sqnr_db(x: Float[Tensor, "rows cols"], how: Quantiser) -> float:
    """Return the signal-to-quantisation-noise ratio of `x` under `how`, in dB."""
    return float(statistics(x, how(x))["sqnr_db"])


def _reach(found: Quantised, scale: Tensor, x: Tensor) -> Tensor:
    """Return the largest magnitude that each element's block can hold, and half a step."""
    most = scale * found.fmt.max * (1 + 2.0 ** -(found.fmt.mantissa + 1))
    if found.block == (0, 0):
        return most
    if found.outer.ndim:
        most = most * found.outer
    return (torch.ones_like(as_blocks(x, found.block)) * most[:, None, :, None]).view(x.shape)
