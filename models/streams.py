"""Several residual streams instead of one: hyper-connections (arXiv 2409.19606) and mHC (arXiv 2512.24880).

Around each branch F, for every token, x being [streams, dim]:

    x_i  <-  sum_j res_ij x_j  +  post_i F(sum_j pre_j x_j)

`hc`   pre, post, res = alpha tanh(theta rms(x)) + b: unconstrained, so that a product of many `res` may grow.
`mhc`  x' = rms(vec x); pre = sigmoid(.), post = 2 sigmoid(.), res = Sinkhorn(exp(.)) of alpha phi x' + b: doubly
       stochastic, so that the product neither grows nor dies out.

At the start each branch reads one stream, writes to all, and streams do not mix: the plain residual.

Shape legend: batch, seq, streams, dim = model width.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.branch import Context, Notes
from models.streams_config import StreamsConfig

Gates = tuple[Float[Tensor, "batch seq streams streams"], Float[Tensor, "batch seq streams"]]
_OPEN = 4.0  # sigmoid(4) = 0.98
_DIAGONAL = 8.0  # exp(8) = 2981 beside 1: twelve layers later the streams are still themselves


class Streams:
    """Both ends of the streams of a decoder: from one residual to several, and back."""

    def __init__(self, num_streams: int) -> None:
        self.num_streams = num_streams

    def spread(
        self, x: Float[Tensor, "batch seq dim"], context: Context
    ) -> Float[Tensor, "batch seq streams dim"]:
        """Return the streams before the first layer: copies of the embedding."""
        n = self.num_streams
        context.mixing = torch.eye(n, device=x.device).expand(*x.shape[:2], n, n)
        return x[:, :, None].expand(-1, -1, n, -1)

    def gather(self, x: Float[Tensor, "batch seq streams dim"]) -> Float[Tensor, "batch seq dim"]:
        """Return what the last norm reads: the mean of the streams (a norm makes it the published sum)."""
        return x.mean(dim=2)

    def notes(self, context: Context) -> Notes:
        """Return the gains of the product of all mixing matrices, over all tokens.

        `amax_forward` and `amax_backward`: largest magnitude of a sum over a row or a column, 1 where nothing grows;
        `min_column_sum`: the smallest, 0 where a stream is forgotten.
        """
        assert context.mixing is not None
        rows, columns = context.mixing.sum(dim=-1), context.mixing.sum(dim=-2)
        return {
            "streams.amax_forward": rows.abs().max(),
            "streams.amax_backward": columns.abs().max(),
            "streams.min_column_sum": columns.min(),
        }


class HyperConnection(nn.Module):
    """See `StreamsConfig`: what a branch reads of the streams, and how they take its output."""

    def __init__(self, cfg: StreamsConfig, width: int, number: int) -> None:
        super().__init__()
        self.cfg, n = cfg, cfg.num_streams
        wide = cfg.kind == "mhc"
        self.weight = nn.Parameter(
            torch.zeros(n * (n + 2), n * width) if wide else torch.zeros(n + 2, width)
        )
        self.alpha = nn.Parameter(torch.full((3,), cfg.alpha))  # of pre, post, res
        pre, diagonal = torch.zeros(n), torch.eye(n)
        pre[number % n] = 1.0
        if wide:
            bias = [_OPEN * (2 * pre - 1), torch.zeros(n), (_DIAGONAL * diagonal).flatten()]
        else:
            bias = [pre, torch.ones(n), diagonal.flatten()]
            self.initial_std = {"weight": 0.0}
        self.bias = nn.Parameter(torch.cat(bias))

    def read(
        self, x: Float[Tensor, "batch seq streams dim"], context: Context
    ) -> tuple[Float[Tensor, "batch seq dim"], Gates]:
        """Return what the branch reads, and how its output will be taken."""
        with torch.autocast(x.device.type, enabled=False):
            pre, post, res = self._mhc(x.float()) if self.cfg.kind == "mhc" else self._hc(x.float())
            if context.mixing is not None:
                context.mixing = res.detach() @ context.mixing
            given = (pre.to(x.dtype)[:, :, None] @ x)[:, :, 0]
        return given, (res, post)

    def write(
        self,
        x: Float[Tensor, "batch seq streams dim"],
        out: Float[Tensor, "batch seq dim"],
        gates: Gates,
    ) -> Float[Tensor, "batch seq streams dim"]:
        """Return the streams after the branch."""
        res, post = gates
        with torch.autocast(x.device.type, enabled=False):
            mixed = res.to(x.dtype) @ x
        return mixed + post.to(x.dtype)[..., None] * out[:, :, None].to(x.dtype)

    def _mhc(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = self.cfg.num_streams
        flat = x.flatten(2)
        pre, post, res = (F.rms_norm(flat, flat.shape[-1:]) @ self.weight.T).split(
            (n, n, n * n), dim=-1
        )  # type: ignore[no-untyped-call]
        b_pre, b_post, b_res = self.bias.split((n, n, n * n))  # type: ignore[no-untyped-call]
        pre = torch.sigmoid(self.alpha[0] * pre + b_pre)
        post = 2.0 * torch.sigmoid(self.alpha[1] * post + b_post)
        logits = (self.alpha[2] * res + b_res).view(*x.shape[:2], n, n)
        return pre, post, sinkhorn(logits, self.cfg.iterations)

    def _hc(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = self.cfg.num_streams
        turned = torch.tanh(
            F.rms_norm(x, x.shape[-1:]) @ self.weight.T
        )  # [batch, seq, streams, n + 2]
        b_pre, b_post, b_res = self.bias.split((n, n, n * n))  # type: ignore[no-untyped-call]
        pre = self.alpha[0] * turned[..., 0] + b_pre
        post = self.alpha[1] * turned[..., 1] + b_post
        return pre, post, self.alpha[2] * turned[..., 2:] + b_res.view(n, n)


def sinkhorn(logits: Float[Tensor, "*rows n n"], iterations: int) -> Float[Tensor, "*rows n n"]:
    """Return exp(logits) scaled to columns and rows that sum to 1 (Sinkhorn & Knopp 1967), rows exactly."""
    logits = logits.float()
    for _ in range(iterations):
        logits = logits - logits.logsumexp(dim=-2, keepdim=True)
        logits = logits - logits.logsumexp(dim=-1, keepdim=True)
    return logits.exp()
