"""Short causal convolution, one filter for each channel: what a token takes from the few before it.

Shape legend: batch, seq, past = inputs before the first, dim = channels, taps: the last one meets the token itself.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor


def short_conv(
    x: Float[Tensor, "batch longer dim"],
    weight: Float[Tensor, "dim taps"],
    *,
    dilation: int = 1,
    documents: Int64[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch seq dim"]:
    """Return y_t = sum over j of weight_j * x_(t - j dilation), of all but the first (taps - 1) * dilation inputs.

    With `documents` (of the tokens that y is for) nothing is taken from another document, nor from the past.
    """
    taps = weight.shape[1]
    past = (taps - 1) * dilation
    seq = x.shape[1] - past
    weight = weight.to(x.dtype)
    y = x[:, past:] * weight[:, -1]
    for j in range(1, taps):
        back = j * dilation
        before = x[:, past - back : past - back + seq]
        if documents is not None:
            earlier = F.pad(documents, (back, 0), value=-1)[:, :seq]
            before = before * (earlier == documents)[..., None].to(x.dtype)
        y = y + before * weight[:, taps - 1 - j]
    return y


def long_conv(
    x: Float[Tensor, "batch longer dim"], weight: Float[Tensor, "dim taps"]
) -> Float[Tensor, "batch seq dim"]:
    """Return what `short_conv` returns, through Fourier transforms in fp32: for filters as long as the text."""
    taps, size = weight.shape[1], x.shape[1]
    length = size + taps
    with torch.autocast(x.device.type, enabled=False):
        spectrum = torch.fft.rfft(x.float(), n=length, dim=1)
        filters = torch.fft.rfft(weight.float().flip(1).T, n=length, dim=0)
        whole: Tensor = torch.fft.irfft(spectrum * filters, n=length, dim=1)
    return whole[:, taps - 1 : size].to(x.dtype)
