"""Cross-entropy of a linear head without ever holding all logits (Cut/Liger-style chunking).

With a vocabulary of 50k the logits of one batch outweigh the model. Rows are taken in chunks:
each chunk's logits are made, turned into the loss and, in place, into their own gradient, which
is multiplied out at once. Memory is chunk x vocab instead of rows x vocab; the GEMMs are the same
three.

Shape legend: rows = batch * sequence, dim = width, vocab = vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kernels.logit_rows import IGNORE, EagerRows, FusedRows, rows_on

# Logits held at once: 128 MiB in fp32. Every chunk adds to all of the weight's gradient, so fewer
# chunks are faster; measured on a CPU, twice as many elements gain 10%, half as many lose 30%.
_CHUNK_ELEMENTS = 1 << 25
# Where kernels read logits as they are and keep no copy in fp32: in bf16 the same memory.
_FUSED_BYTES = 1 << 28
# Weights of rows: a tensor, or a function of (detached nll of all rows with a target, their
# indices; rows without one may be among them). Give a bound method of an object that holds the
# batch's data: a new closure would recompile a compiled step.
Weights = Tensor | Callable[[Tensor, Tensor], Tensor]


def linear_cross_entropy(
    hidden: Float[Tensor, "rows dim"],
    weight: Float[Tensor, "vocab dim"],
    targets: Int64[Tensor, " rows"],
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    weights: Weights | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " rows"]]:
    """Return (sum of the training loss, per-row negative log-likelihood in nats).

    logits = scale * hidden @ weight.T, then softcap * tanh(logits / softcap) if given. The loss is
    sum(w * (nll + z_loss * logsumexp(logits)**2)) over rows whose target is not -100 (`IGNORE`).

    The nll is fp32, unweighted and 0 at ignored rows; neither it nor the weights carry a gradient.
    Where most rows are ignored, a CPU computes only the others.

    Args:
        weights: w of each row, see `Weights`; None: 1. A function costs the logits of all rows once
            more where they do not fit into one chunk: a weight may depend on the nll of all.
    """
    if not torch.is_grad_enabled():  # autograd.Function would compute gradients for a parameter
        hidden, weight = hidden.detach(), weight.detach()
    if _mostly_ignored(targets):
        rows = (targets != IGNORE).nonzero()[:, 0]
        if isinstance(weights, Tensor):
            weights = weights[rows]
        elif weights is not None:
            weights = _OfRows(weights, rows)
        loss, nll = linear_cross_entropy(
            hidden.index_select(0, rows),
            weight,
            targets[rows],
            scale=scale,
            softcap=softcap,
            z_loss=z_loss,
            weights=weights,
        )
        return loss, nll.new_zeros(len(targets)).index_copy(0, rows, nll)
    loss, nll = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, scale, softcap, z_loss, weights
    )
    return loss, nll


class _OfRows:
    """Weights of chosen rows by a function that takes their indices among all rows."""

    def __init__(self, weigh: Callable[[Tensor, Tensor], Tensor], rows: Tensor) -> None:
        self.weigh, self.rows = weigh, rows

    def __call__(self, nll: Tensor, rows: Tensor) -> Tensor:
        return self.weigh(nll, self.rows[rows])


def _mostly_ignored(targets: Tensor) -> bool:
    """Return whether most rows are ignored; False on a GPU, where the host would have to wait."""
    if (
        targets.device.type != "cpu"
        or torch.compiler.is_compiling()
        or isinstance(targets, FakeTensor)
    ):
        return False
    return 0 < 2 * int((targets != IGNORE).sum()) < len(targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        z_loss: float,
        weights: Weights | None,
    ) -> tuple[Tensor, Tensor]:
        needs = ctx.needs_input_grad[:2]
        rows = rows_on(hidden.device, scale, softcap, z_loss)
        if isinstance(rows, FusedRows) and torch.compiler.is_compiling() and not callable(weights):
            loss, nll, *made = torch.ops.espalier.linear_cross_entropy(
                hidden, weight, targets, scale, softcap, z_loss, weights, *needs
            )
            gradients = [grad if needed else None for grad, needed in zip(made, needs, strict=True)]
        else:
            loss, nll, *gradients = _by_chunks(hidden, weight, targets, rows, weights, needs)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_loss: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # In place: the weight's gradient is as large as a big vocabulary's embedding. A second
        # backward pass through the same graph is refused by autograd's version counter.
        if grad_hidden is not None:
            grad_hidden.mul_(grad_loss.to(grad_hidden.dtype))
        if grad_weight is not None:
            grad_weight.mul_(grad_loss)
        return grad_hidden, grad_weight, None, None, None, None, None


def _by_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    on_device: EagerRows | FusedRows,
    weights: Weights | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return (loss, nll, gradients by `hidden` and `weight`, where they are needed)."""
    needs_hidden, needs_weight = needs
    head = weight.to(hidden.dtype)
    rows, vocab = hidden.shape[0], weight.shape[0]
    scale, z_loss = on_device.scale, on_device.z_loss
    nll = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if needs_hidden else None
    grad_weight = None
    fused = isinstance(on_device, FusedRows)
    elements = _FUSED_BYTES // hidden.element_size() if fused else _CHUNK_ELEMENTS
    chunks = _chunks(rows, vocab, elements)
    if callable(weights) and len(chunks) > 1:
        for chunk in chunks:
            nll[chunk] = on_device.nll(hidden[chunk] @ head.T, targets[chunk])[0]
        weights = weights(nll, torch.arange(rows, device=nll.device))
    for chunk in chunks:
        row_loss, lse, kept = on_device.nll(hidden[chunk] @ head.T, targets[chunk])
        nll[chunk], valid = row_loss, targets[chunk] != IGNORE
        weigh = _weights_of(weights, row_loss, chunk)
        # No +=: torch.compile of torch 2.11 gives zeros as gradients of an output changed in place.
        if weigh is None:
            loss = loss + row_loss.sum() + z_loss * (lse * lse * valid).sum()
        else:
            loss = loss + (weigh * (row_loss + z_loss * lse * lse * valid)).sum()
        if needs_hidden or needs_weight:
            grad_logits = on_device.gradient(kept, targets[chunk], lse, weigh)
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, head, out=grad_hidden[chunk])
            if needs_weight:
                grad_weight = _add_product(grad_weight, grad_logits.T, hidden[chunk], weight.dtype)
    if grad_hidden is not None and scale != 1.0:
        grad_hidden *= scale
    if grad_weight is not None and scale != 1.0:
        grad_weight *= scale
    return loss, nll, grad_hidden, grad_weight


# One node of a compiled graph, in which a loop over the chunks of a large vocabulary would be as
# long as the model. Without kernels the compiler fuses what the loop does.
@torch.library.custom_op("espalier::linear_cross_entropy", mutates_args=())
def _compiled(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    z_loss: float,
    weights: Tensor | None,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, needs = FusedRows(scale, softcap, z_loss), (needs_hidden, needs_weight)
    loss, nll, *gradients = _by_chunks(hidden, weight, targets, rows, weights, needs)
    of_hidden, of_weight = (loss.new_empty(0) if grad is None else grad for grad in gradients)
    return loss, nll, of_hidden, of_weight


@_compiled.register_fake
def _(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_hidden, of_weight = (
        torch.empty_like(x) if needed else x.new_empty(0)
        for x, needed in zip((hidden, weight), arguments[-2:], strict=True)
    )
    loss = hidden.new_empty((), dtype=torch.float32)
    return loss, hidden.new_empty(len(hidden), dtype=torch.float32), of_hidden, of_weight


def _chunks(rows: int, vocab: int, elements: int) -> list[slice]:
    size = max(1, min(rows, elements // vocab))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _weights_of(weights: Weights | None, nll: Tensor, chunk: slice) -> Tensor | None:
    """Return the weight of each row of a chunk, None where all are 1."""
    if weights is None:
        return None
    if isinstance(weights, Tensor):
        return weights[chunk].detach().to(nll.dtype)
    rows = torch.arange(chunk.start, chunk.stop, device=nll.device)
    return weights(nll, rows).detach().to(nll.dtype)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return total + a @ b in `dtype`, in place where there is a total."""
    if total is None:
        return (a @ b).to(dtype)
    return total.addmm_(a, b) if a.dtype == dtype else total.add_(a @ b)
