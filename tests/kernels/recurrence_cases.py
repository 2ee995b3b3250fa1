"""Recurrences whose states one kernel passes on, against chunk after chunk in fp64, on a device.

tests/kernels/test_triton.py runs these under Triton's interpreter, tests/gpu on a GPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import recurrence as chunks
from kernels.state_pass import eager_pass, pass_states

KINDS = ("plain", "scalar", "wide", "delta")


def inputs(kind: str, shape: tuple[int, int, int, int, int]) -> dict[str, Any]:
    """Return arguments of `recurrence` in fp32, of shape (batch, heads, seq, k, v).

    The two documents of each sequence end at one third and at two thirds of it.
    """
    batch, heads, seq, k, v = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(batch, heads, *size, generator=generator)

    given = {"q": normal(seq, k), "k": normal(seq, k), "v": normal(seq, v), "state": normal(k, v)}
    given["k"] /= given["k"].norm(dim=-1, keepdim=True)
    if kind != "plain":
        given["log_decay"] = -normal(seq, k if kind == "wide" else 1).abs()
    if kind == "delta":
        given["beta"] = normal(seq).sigmoid()
    places = torch.arange(seq).expand(batch, -1)
    cut = seq * (1 + torch.arange(batch)[:, None] % 2) // 3
    return given | {"documents": (places >= cut).long()}


def gradients(given: dict[str, Any], function: Callable[..., Any], chunk: int) -> list[Tensor]:
    """Return outputs, last state and the gradients of every argument but documents."""
    leaves = {n: t.clone().requires_grad_() for n, t in given.items() if n != "documents"}
    out, state = function(**leaves, documents=given["documents"], chunk=chunk)
    total = (out * out).sum() + state.sin().sum()
    return [out.detach(), state.detach(), *torch.autograd.grad(total, list(leaves.values()))]


def check_recurrence(
    kind: str, shape: tuple[int, int, int, int, int], chunk: int, device: torch.device
) -> None:
    """Hold outputs, the last state and all gradients to 1e-4 of the largest of each.

    Sums of tens of terms in fp32 (2**-24 each, 1e-5 in all) meet decays that were exponentials of
    sums; TF32 would be off by 1e-3.
    """
    given = {name: t.to(device) for name, t in inputs(kind, shape).items()}
    exact = {n: t if t.dtype is torch.int64 else t.double() for n, t in given.items()}
    found = gradients(given, chunks.recurrence, chunk)
    wanted = gradients(exact, chunks.recurrence, chunk)  # fp64: chunk after chunk
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-4, (kind, shape)


def check_pass(device: torch.device) -> None:
    """Hold gradients and second gradients of the op, which are passes themselves, to 1e-4."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((1, 2, 4, 5, 3), (1, 2, 4, 5, 1), (1, 2, 4, 5, 5), (1, 2, 5, 3))
    given = [torch.randn(size, generator=generator).to(device) for size in sizes]
    results = []
    for exact in (False, True):
        leaves = [(t.double() if exact else t).clone().requires_grad_() for t in given]
        entering, leaving = _eager(*leaves) if exact else pass_states(*leaves)
        first = torch.autograd.grad(
            entering.sin().sum() + leaving.cos().sum(), leaves, create_graph=True
        )
        second = torch.autograd.grad(sum((t * t).sum() for t in first), leaves)
        results.append([t.detach() for t in (*first, *second)])
    for a, b in zip(*results, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-4


def _eager(*terms: Tensor) -> tuple[Tensor, Tensor]:
    return eager_pass(*terms, backward=False)
