"""Kullback-Leibler divergences between the next tokens of two models, with their gradient.

With p the teacher's and q the student's probabilities at temperature T:

    forward    sum p log(p / q)
    reverse    sum q log(q / p)
    top_k      forward, over the teacher's k likeliest tokens and one outcome for all others: at
               most the forward divergence, 0 where the two agree on these

Rows are taken in chunks; the gradient is made beside the value, and nothing else is held.

Shape legend: rows = batch * sequence, vocab = vocabulary, k.
"""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Divergence = Literal["forward", "reverse", "top_k"]
_CHUNK_ELEMENTS = 1 << 24  # 64 MiB for each of the few tensors of a chunk


def divergence(
    student: Float[Tensor, "rows vocab"],
    teacher: Float[Tensor, "rows vocab"],
    counted: Bool[Tensor, " rows"],
    *,
    kind: Divergence = "forward",
    temperature: float = 1.0,
    k: int = 64,
) -> tuple[Float[Tensor, ""], Float[Tensor, " rows"]]:
    """Return (T^2 times the sum over counted rows, the divergence of each row in nats).

    The sum has a gradient by the student's logits, which T^2 makes comparable over temperatures
    (Hinton et al., arXiv 1503.02531); the rows have none, and are 0 where not counted.

    Args:
        student, teacher: logits.
        k: of top_k, at most vocab - 1.
    """
    total, rows = _Divergence.apply(student, teacher, counted, kind, temperature, k)  # type: ignore[no-untyped-call]
    return total, rows


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        counted: Tensor,
        kind: Divergence,
        temperature: float,
        k: int,
    ) -> tuple[Tensor, Tensor]:
        rows, vocab = student.shape
        values = torch.empty(rows, dtype=torch.float32, device=student.device)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        size = max(1, min(rows, _CHUNK_ELEMENTS // vocab))
        for start in range(0, rows, size):
            at = slice(start, start + size)
            logq = (student[at].float() / temperature).log_softmax(-1)
            logp = (teacher[at].float() / temperature).log_softmax(-1)
            value, slope = _KINDS[kind](logq, logp, min(k, vocab - 1))
            values[at] = torch.where(counted[at], value, 0.0)
            if gradient is not None:
                slope *= counted[at, None] * temperature
                gradient[at] = slope
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(values)
        return temperature**2 * values.sum(), values

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_total.to(gradient.dtype)), None, None, None, None, None


def _forward(logq: Tensor, logp: Tensor, _: int) -> tuple[Tensor, Tensor]:
    p = logp.exp()
    return (p * (logp - logq)).sum(-1), logq.exp() - p


def _reverse(logq: Tensor, logp: Tensor, _: int) -> tuple[Tensor, Tensor]:
    q, ratio = logq.exp(), logq - logp
    value = (q * ratio).sum(-1)
    return value, q * (ratio - value[:, None])


def _top_k(logq: Tensor, logp: Tensor, k: int) -> tuple[Tensor, Tensor]:
    chosen = logp.topk(k, dim=-1).indices
    top_p, top_q = logp.gather(-1, chosen), logq.gather(-1, chosen)
    rest_p, rest_q = (
        x.scatter(-1, chosen, -torch.inf).logsumexp(-1, keepdim=True) for x in (logp, logq)
    )
    p, rest = top_p.exp(), rest_p.exp()
    value = (p * (top_p - top_q)).sum(-1) + (rest * (rest_p - rest_q))[:, 0]
    q = logq.exp()
    slope = (q * (1.0 - (rest_p - rest_q).exp())).scatter(-1, chosen, top_q.exp() - p)
    return value, slope


_KINDS = {"forward": _forward, "reverse": _reverse, "top_k": _top_k}
