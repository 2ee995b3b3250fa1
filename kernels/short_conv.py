"""Causal convolution with one filter for each channel.

Shape legend: batch, seq = outputs, longer = seq + past inputs, dim = channels, taps = weights of a
filter, the last of which multiplies the token itself.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from kernels.at_least_fp32 import at_least_fp32


def short_conv(
    x: Float[Tensor, "batch longer dim"],
    weight: Float[Tensor, "dim taps"],
    *,
    dilation: int = 1,
    documents: Int64[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch seq dim"]:
    """Return y_t = sum_j weight_(taps-1-j) x_(t - j dilation) for all but the first inputs.

    The first (taps - 1) * dilation inputs are past only.

    Args:
        documents: an id for each token of y; inputs of other documents and the past count as 0.
    """
    taps = weight.shape[1]
    past = (taps - 1) * dilation
    seq = x.shape[1] - past
    weight = weight.to(x.dtype)
    y = x[:, past:] * weight[:, -1]
    for j in range(1, taps):
        delay = j * dilation
        delayed = x[:, past - delay : past - delay + seq]
        if documents is not None:
            earlier = F.pad(documents, (delay, 0), value=-1)[:, :seq]
            delayed = delayed * (earlier == documents)[..., None].to(x.dtype)
        y = y + delayed * weight[:, taps - 1 - j]
    return y


def long_conv(
    x: Float[Tensor, "batch longer dim"], weight: Float[Tensor, "dim taps"]
) -> Float[Tensor, "batch seq dim"]:
    """Return `short_conv(x, weight)` by Fourier transforms in fp32 or fp64, for long filters."""
    taps, size = weight.shape[1], x.shape[1]
    length = size + taps
    with torch.autocast(x.device.type, enabled=False):
        spectrum = torch.fft.rfft(at_least_fp32(x), n=length, dim=1)
        filters = torch.fft.rfft(at_least_fp32(weight).flip(1).T, n=length, dim=0)
        y: Tensor = torch.fft.irfft(spectrum * filters, n=length, dim=1)
    return y[:, taps - 1 : size].to(x.dtype)
