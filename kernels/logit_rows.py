"""Rows of logits: the negative log-likelihood of each, and in the place of logits its gradient.

Eager torch passes over fp32 logits a dozen times. Two Triton kernels read them as they leave their
product, once for the likelihood, and once more to write the gradient over them.

Shape legend: rows; vocab = vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from kernels.triton_check import triton_agrees

IGNORE = -100
Kept = tuple[Tensor | None, ...]  # between a row's likelihood and its gradient


@dataclass(frozen=True)
class EagerRows:
    """The reference: in fp32, in the place of the logits.

    Args:
        scale: logits are multiplied by it first.
        softcap: then they become softcap * tanh(logits / softcap), None: they stay.
        z_loss: weight of logsumexp**2 beside the nll.
    """

    scale: float
    softcap: float | None
    z_loss: float

    def nll(
        self, logits: Float[Tensor, "rows vocab"], targets: Int64[Tensor, " rows"]
    ) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"], Kept]:
        """Return (nll in nats, 0 where the target is IGNORE; logsumexp; what `gradient` takes)."""
        logits, slope = logits.float(), None
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
            slope = 1.0 - (logits / self.softcap).square()
        peak = logits.amax(dim=-1)
        picked = logits.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
        total = logits.sub_(peak[:, None]).exp_().sum(dim=-1)
        lse = peak + total.log()
        nll = torch.where(targets != IGNORE, lse - picked, torch.zeros_like(lse))
        return nll, lse, (logits, total, slope)

    def gradient(
        self,
        kept: Kept,
        targets: Int64[Tensor, " rows"],
        lse: Float[Tensor, " rows"],
        weights: Float[Tensor, " rows"] | None,
    ) -> Float[Tensor, "rows vocab"]:
        """Return the gradient of sum w * (nll + z_loss * lse**2) by the scaled logits."""
        exps, total, slope = kept
        assert exps is not None
        assert total is not None
        valid = targets != IGNORE
        factors = (1.0 + 2.0 * self.z_loss * lse) * valid / total
        at_target = valid.to(factors.dtype)
        if weights is not None:
            factors, at_target = factors * weights, at_target * weights
        exps *= factors[:, None]
        exps.scatter_add_(-1, targets.clamp(min=0)[:, None], -at_target[:, None])
        if slope is not None:
            exps *= slope
        return exps


@dataclass(frozen=True)
class FusedRows:
    """`EagerRows` by kernels: the gradient has the place and the dtype of the logits."""

    scale: float
    softcap: float | None
    z_loss: float

    def nll(
        self, logits: Float[Tensor, "rows vocab"], targets: Int64[Tensor, " rows"]
    ) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"], Kept]:
        """See `EagerRows`."""
        cap = self.softcap or 0.0
        nll, lse = torch.ops.espalier.row_nll(logits, targets, self.scale, cap)
        return nll, lse, (logits,)

    def gradient(
        self,
        kept: Kept,
        targets: Int64[Tensor, " rows"],
        lse: Float[Tensor, " rows"],
        weights: Float[Tensor, " rows"] | None,
    ) -> Float[Tensor, "rows vocab"]:
        """See `EagerRows`."""
        (logits,) = kept
        assert logits is not None
        at_target = (targets != IGNORE).to(lse.dtype)
        if weights is not None:
            at_target = at_target * weights
        factors = (1.0 + 2.0 * self.z_loss * lse) * at_target
        torch.ops.espalier.row_gradient(
            logits, targets, lse, factors, at_target, self.scale, self.softcap or 0.0
        )
        return logits


def rows_on(
    device: torch.device, scale: float, softcap: float | None, z_loss: float
) -> EagerRows | FusedRows:
    """Return what computes rows of logits on `device`."""
    return (FusedRows if _has_kernels(device) else EagerRows)(scale, softcap, z_loss)


# A constant: torch.compile would trace the comparison.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_kernels(device: torch.device) -> bool:
    return triton_agrees(device, _compare)


@torch.library.custom_op("espalier::row_nll", mutates_args=())
def _row_nll(
    logits: Tensor, targets: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    from kernels import triton_logit_rows  # noqa: PLC0415

    return triton_logit_rows.nll(logits, targets, scale, softcap)


@_row_nll.register_fake
def _(logits: Tensor, targets: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    nll, lse = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return nll, lse


@torch.library.custom_op("espalier::row_gradient", mutates_args=("logits",))
def _row_gradient(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    factors: Tensor,
    at_target: Tensor,
    scale: float,
    softcap: float,
) -> None:
    from kernels import triton_logit_rows  # noqa: PLC0415

    triton_logit_rows.gradient(logits, targets, lse, factors, at_target, scale, softcap)


@_row_gradient.register_fake
def _(*_: Any) -> None:
    return None


def _compare(device: torch.device) -> None:
    """Raise ValueError where the kernels differ from fp64 by more than 1e-4 of the largest value.

    fp32 is off by 1e-6 there; a gradient that is rounded to bf16 by 4e-3.
    """
    generator = torch.Generator().manual_seed(0)
    numbers = 4 * torch.randn(5, 5000, generator=generator)
    targets = torch.tensor([7, IGNORE, 4999, 0, 1234], device=device)
    weights = torch.tensor([1.0, 1.0, 0.5, 2.0, -1.0], device=device)
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
        for softcap in (None, 5.0):
            rows, logits = FusedRows(0.7, softcap, 0.1), numbers.to(device, dtype)
            exact = (logits.double() * 0.7).requires_grad_()
            shown = exact if softcap is None else softcap * torch.tanh(exact / softcap)
            wanted = F.cross_entropy(shown, targets, reduction="none", ignore_index=IGNORE)
            z = 0.1 * shown.logsumexp(-1).square() * (targets != IGNORE)
            ((wanted + z) * weights).sum().backward()  # type: ignore[no-untyped-call]
            nll, lse, kept = rows.nll(logits, targets)
            found = rows.gradient(kept, targets, lse, weights)
            assert exact.grad is not None
            for a, b, most in ((nll, wanted.detach(), 1e-4), (found, exact.grad, bound)):
                error = float((a.double() - b).abs().max() / b.abs().max())
                if not error < most:
                    raise ValueError(f"rows of {dtype} logits are off by {error:.1e}")
