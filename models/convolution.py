"""A gated convolution, short or as long as the context: Zoology's BaseConv (arXiv 2312.04927).

    y = ((x W + b) * (conv(x) + c)) W_out; conv has one filter for each channel.

Shape legend: batch, seq, dim = model width.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kernels.short_conv import long_conv, short_conv
from models.branch import Context
from models.cache import with_history

_SHORT = 8  # taps up to which shifted inputs are summed instead of an FFT


class Convolution(nn.Module):
    """The branch of a `ConvolutionConfig`."""

    filters = ("conv",)

    def __init__(self, width: int, taps: int, number: int) -> None:
        super().__init__()
        self.number, self.taps = number, taps
        self.proj = nn.Linear(width, width, bias=True)
        self.conv = nn.Parameter(torch.empty(width, taps))
        self.conv_bias = nn.Parameter(torch.zeros(width))
        self.initial_std = {"conv": taps**-0.5}
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Float[Tensor, "batch seq dim"], context: Context
    ) -> Float[Tensor, "batch seq dim"]:
        past = with_history(context.state, self.number, "conv", x, self.taps - 1)
        if self.taps > _SHORT and context.documents is None:
            mixed = long_conv(past, self.conv)
        else:
            mixed = short_conv(past, self.conv, documents=context.documents)
        return self.out(self.proj(x) * (mixed + self.conv_bias.to(mixed.dtype)))  # type: ignore[no-any-return]
