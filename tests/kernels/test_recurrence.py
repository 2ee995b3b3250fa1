"""Recurrences in chunks equal those token by token, for any chunk, documents and first state."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.recurrence import recurrence, scan


def _inputs(seq: int, wide: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, seq, 5, generator=generator, dtype=torch.float32) for _ in range(2))
    return {
        "q": q,
        "k": k / k.norm(dim=-1, keepdim=True),
        "v": torch.randn(2, 3, seq, 4, generator=generator),
        "log_decay": -torch.rand(2, 3, seq, 5 if wide else 1, generator=generator) * 3,
        "state": torch.randn(2, 3, 5, 4, generator=generator),
    }


def _by_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    beta: Tensor | None,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition, in fp64; the state belongs to the first token's document."""
    q, k, v, log_decay, state = (t.double() for t in (q, k, v, log_decay, state))
    out = torch.zeros_like(v)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            s = state[b, h].clone()
            for t in range(q.shape[2]):
                if documents is not None and t and documents[b, t] != documents[b, t - 1]:
                    s = torch.zeros_like(s)
                s = s * log_decay[b, h, t].exp()[:, None]
                key, value = k[b, h, t], v[b, h, t]
                if beta is None:
                    s = s + torch.outer(key, value)
                else:
                    rate = beta[b, h, t].double()
                    s = s - rate * torch.outer(key, key @ s) + rate * torch.outer(key, value)
                out[b, h, t] = q[b, h, t] @ s
            state[b, h] = s
    return out, state


@pytest.mark.parametrize("kind", ["scalar", "wide", "delta"])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("seq", "chunk"), [(1, 64), (23, 8), (40, 16), (40, 64)])
def test_chunks_are_the_recurrence(kind: str, apart: bool, seq: int, chunk: int) -> None:
    given = _inputs(seq, wide=kind == "wide")
    given["beta"] = (
        torch.rand(2, 3, seq, generator=torch.Generator().manual_seed(1))
        if kind == "delta"
        else None
    )
    given["documents"] = None
    if apart:
        given["documents"] = torch.stack((torch.arange(seq) // 7, torch.arange(seq) // 18))
    expected, end = _by_token(**given)
    found, state = recurrence(**given, chunk=chunk)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.double(), end, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["scalar", "wide", "delta"])
def test_the_gradient_is_that_of_the_recurrence(kind: str) -> None:
    given = _inputs(13, wide=kind == "wide")
    beta = (
        torch.rand(2, 3, 13, generator=torch.Generator().manual_seed(1))
        if kind == "delta"
        else None
    )
    grads = []
    for function in (lambda **x: recurrence(**x, chunk=4), lambda **x: _differentiable(**x)):
        leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
        out = function(**leaves, beta=beta, documents=None)
        out = out[0] if isinstance(out, tuple) else out
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        grads.append(torch.autograd.grad((out * weights).sum(), list(leaves.values())))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def _differentiable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    beta: Tensor | None,
    documents: None,
) -> Tensor:
    out, s = [], state
    for t in range(q.shape[2]):
        s = s * log_decay[:, :, t].exp()[..., None]
        key, value = k[:, :, t], v[:, :, t]
        if beta is not None:
            value = beta[:, :, t, None] * (value - (key[:, :, None] @ s)[:, :, 0])
        s = s + key[..., None] * value[:, :, None]
        out.append((q[:, :, t][:, :, None] @ s)[:, :, 0])
    return torch.stack(out, dim=2)


def test_a_scan_is_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    decay, added = (
        torch.rand(2, 37, 3, generator=generator),
        torch.randn(2, 37, 3, generator=generator),
    )
    first = torch.randn(2, 3, generator=generator)
    h, expected = first, []
    for t in range(37):
        h = decay[:, t] * h + added[:, t]
        expected.append(h)
    torch.testing.assert_close(
        scan(decay, added, first), torch.stack(expected, dim=1), rtol=1e-5, atol=1e-5
    )
