"""Several residual streams: hyper-connections (arXiv 2409.19606) and mHC (arXiv 2512.24880).

Around each branch F, for every token, x being [streams, dim]:

    x_i  <-  sum_j res_ij x_j  +  post_i F(sum_j pre_j x_j)

`hc`   pre, post, res = alpha tanh(theta rms(x)) + b: unconstrained; a product of `res` may grow.
`mhc`  pre = sigmoid(z), post = 2 sigmoid(z), res = Sinkhorn(exp(z)), z = alpha phi rms(vec x) + b:
       `res` is doubly stochastic, so that the product neither grows nor vanishes.

At initialisation each branch reads one stream and writes to all, and streams do not mix, which is
the plain residual.

Shape legend: batch, seq, streams, dim = model width.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kernels.at_least_fp32 import at_least_fp32
from models.branch import Context, Notes
from models.streams_config import StreamsConfig

Gates = tuple[Float[Tensor, "batch seq streams streams"], Float[Tensor, "batch seq streams"]]
_OPEN = 4.0  # sigmoid(4) = 0.98
_DIAGONAL = 8.0  # exp(8) = 2981 to 1: streams are still distinct twelve layers later


class Streams:
    """Both ends of the streams: one residual stream becomes several, and in the end one again."""

    def __init__(self, num_streams: int) -> None:
        self.num_streams = num_streams

    def spread(
        self, x: Float[Tensor, "batch seq dim"], context: Context
    ) -> Float[Tensor, "batch seq streams dim"]:
        """Return the streams before the first layer: copies of the embedding."""
        n = self.num_streams
        wide = torch.promote_types(x.dtype, torch.float32)
        context.mixing = torch.eye(n, dtype=wide, device=x.device).expand(*x.shape[:2], n, n)
        return x[:, :, None].expand(-1, -1, n, -1)

    def gather(self, x: Float[Tensor, "batch seq streams dim"]) -> Float[Tensor, "batch seq dim"]:
        """Return the mean of the streams, for the last norm.

        The papers take the sum, which is the same after a norm.
        """
        return x.mean(dim=2)

    def notes(self, context: Context) -> Notes:
        """Return the gains of the product of all mixing matrices, the extremes over all tokens.

        `amax_forward` and `amax_backward` are the largest magnitudes of a row's and a column's sum,
        1 if nothing grows; `min_column_sum` is the smallest column sum, 0 if a stream is lost.
        """
        assert context.mixing is not None
        rows, columns = context.mixing.sum(dim=-1), context.mixing.sum(dim=-2)
        return {
            "streams.amax_forward": rows.abs().max(),
            "streams.amax_backward": columns.abs().max(),
            "streams.min_column_sum": columns.min(),
        }


class HyperConnection(nn.Module):
    """The connection of one branch: it mixes the streams for the branch and adds its output."""

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
        """Return (input of the branch, gates for `write`)."""
        with torch.autocast(x.device.type, enabled=False):
            gates = self._mhc if self.cfg.kind == "mhc" else self._hc
            pre, post, res = gates(at_least_fp32(x))
            if context.mixing is not None:
                context.mixing = res.detach() @ context.mixing
            mixed = (pre.to(x.dtype)[:, :, None] @ x)[:, :, 0]
        return mixed, (res, post)

    def write(
        self,
        x: Float[Tensor, "batch seq streams dim"],
        out: Float[Tensor, "batch seq dim"],
        gates: Gates,
    ) -> Float[Tensor, "batch seq streams dim"]:
        """Return the streams after the branch, whose output is `out`."""
        res, post = gates
        with torch.autocast(x.device.type, enabled=False):
            mixed = res.to(x.dtype) @ x
        return mixed + post.to(x.dtype)[..., None] * out[:, :, None].to(x.dtype)

    def _mhc(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = self.cfg.num_streams
        flat = x.flatten(2)
        raw = F.rms_norm(flat, flat.shape[-1:]) @ self.weight.T
        pre, post, res = raw.split((n, n, n * n), dim=-1)  # type: ignore[no-untyped-call]
        b_pre, b_post, b_res = self.bias.split((n, n, n * n))  # type: ignore[no-untyped-call]
        pre = torch.sigmoid(self.alpha[0] * pre + b_pre)
        post = 2.0 * torch.sigmoid(self.alpha[1] * post + b_post)
        logits = (self.alpha[2] * res + b_res).view(*x.shape[:2], n, n)
        return pre, post, sinkhorn(logits, self.cfg.iterations)

    def _hc(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = self.cfg.num_streams
        # [batch, seq, streams, n + 2]
        raw = torch.tanh(F.rms_norm(x, x.shape[-1:]) @ self.weight.T)
        b_pre, b_post, b_res = self.bias.split((n, n, n * n))  # type: ignore[no-untyped-call]
        pre = self.alpha[0] * raw[..., 0] + b_pre
        post = self.alpha[1] * raw[..., 1] + b_post
        return pre, post, self.alpha[2] * raw[..., 2:] + b_res.view(n, n)


def sinkhorn(logits: Float[Tensor, "*rows n n"], iterations: int) -> Float[Tensor, "*rows n n"]:
    """Return exp(logits) normalised to columns and rows that sum to 1 (Sinkhorn & Knopp 1967).

    Rows are normalised last, so their sums are exact; those of columns converge.
    """
    logits = at_least_fp32(logits)
    for _ in range(iterations):
        logits = logits - logits.logsumexp(dim=-2, keepdim=True)
        logits = logits - logits.logsumexp(dim=-1, keepdim=True)
    return logits.exp()
