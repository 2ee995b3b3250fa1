"""Statistics of quantised tensors, to find out why a low-precision run goes wrong.

Each is a pass over the tensor by the eager reference: compute them once in many steps.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.quantise import Quantised, as_blocks
from kernels.quantiser import Quantiser


def statistics(
    x: Float[Tensor, "rows cols"],
    quantised: Quantised,
    before: Float[Tensor, "rows cols"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Return 0-d tensors that describe `quantised`, which is `x` quantised.

    amax            largest magnitude
    sqnr_db         10 log10 (signal / error energy)
    underflow       share of the non-zero elements that became 0
    saturation      share beyond what their block's scale can hold
    zero_scales     share of blocks whose scale is 0
    scale_log2_K    share of blocks whose scale lies in [2^K, 2^(K+1)), for every K that occurs
    bias            mean of sign(x) (quantised - x) over mean |x|; 0 under stochastic rounding
    kurtosis        E x^4 / (E x^2)^2, 3 for a Gaussian
    kurtosis_gain   kurtosis of `before` (x without its Hadamard transform) over that of x
    """
    x = x.float()
    values = quantised.dequantise()
    error = values - x
    positive = quantised.scales[quantised.scales > 0].log2().floor()
    octaves, counts = torch.unique(positive, return_counts=True)  # type: ignore[no-untyped-call]
    result = {
        "amax": x.abs().amax(),
        "sqnr_db": 10 * torch.log10(x.square().sum() / error.square().sum().clamp(min=1e-30)),
        "underflow": ((values == 0) & (x != 0)).sum() / (x != 0).sum().clamp(min=1),
        "saturation": (x.abs() > _reach(quantised, x)).float().mean(),
        "zero_scales": (quantised.scales == 0).float().mean(),
        "bias": (x.sign() * error).mean() / x.abs().mean().clamp(min=1e-30),
        "kurtosis": kurtosis(x),
    }
    shares = counts / quantised.scales.numel()
    result |= {f"scale_log2_{int(k)}": share for k, share in zip(octaves, shares, strict=True)}
    if before is not None:
        result["kurtosis_gain"] = kurtosis(before.float()) / result["kurtosis"]
    return result


def kurtosis(x: Float[Tensor, "rows cols"]) -> Float[Tensor, ""]:
    """Return E x^4 / (E x^2)^2."""
    square = x.square()
    return square.square().mean() / square.mean().square().clamp(min=1e-30)


def sqnr_db(x: Float[Tensor, "rows cols"], quantiser: Quantiser) -> float:
    """Return the signal-to-quantisation-noise ratio of `x` under `quantiser`, in dB."""
    return float(statistics(x, quantiser(x))["sqnr_db"])


def _reach(quantised: Quantised, x: Tensor) -> Tensor:
    """Return the largest magnitude that each element's block can hold, plus half a step."""
    fmt, outer = quantised.fmt, quantised.outer
    scale = quantised.scales * outer if outer.ndim == 0 else quantised.scales
    largest = scale * fmt.max * (1 + 2.0 ** -(fmt.mantissa + 1))
    if quantised.block == (0, 0):
        return largest
    blocks = torch.ones_like(as_blocks(x, quantised.block))
    reach = (blocks * largest[:, None, :, None]).view(x.shape)
    return reach * outer if outer.ndim else reach
