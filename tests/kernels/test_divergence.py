"""Divergences against torch in float64, their gradients against autograd."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels import divergence as module
from kernels.divergence import divergence


def _plain(kind: str, student: Tensor, teacher: Tensor, t: float, k: int) -> Tensor:
    """Return the divergence of each row in the textbook's form."""
    q, p = (student / t).softmax(-1), (teacher / t).softmax(-1)
    if kind == "reverse":
        q, p = p, q
    if kind == "top_k":
        at = p.topk(k).indices
        tops = [x.gather(-1, at) for x in (p, q)]
        p, q = (torch.cat((top, 1 - top.sum(-1, keepdim=True)), dim=-1) for top in tops)
    return functional.kl_div(q.log(), p, reduction="none").sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", ["forward", "reverse", "top_k"])
def test_values_and_gradients_are_those_of_the_textbook(
    kind: Any, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 3 * 11)  # several ragged chunks
    torch.manual_seed(0)
    student = (3 * torch.randn(10, 11)).requires_grad_()
    teacher, counted = 3 * torch.randn(10, 11), torch.arange(10) % 4 != 1
    total, rows = divergence(student, teacher, counted, kind=kind, temperature=temperature, k=4)
    (ours,) = torch.autograd.grad(total, student)
    exact = student.detach().double().requires_grad_()
    values = _plain(kind, exact, teacher.double(), temperature, 4) * counted
    (theirs,) = torch.autograd.grad(temperature**2 * values.sum(), exact)
    torch.testing.assert_close(rows.double(), values.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
    assert (ours[~counted] == 0).all()


def test_top_k_is_below_the_whole_and_equal_models_have_none() -> None:
    torch.manual_seed(0)
    student, teacher, all_rows = torch.randn(20, 11), torch.randn(20, 11), torch.ones(20).bool()
    whole = divergence(student, teacher, all_rows)[1]
    before = torch.zeros(20)
    for k in (1, 3, 6, 10, 99):
        part = divergence(student, teacher, all_rows, kind="top_k", k=k)[1]
        assert (before <= part + 1e-6).all()
        assert (part <= whole + 1e-6).all()
        before = part
    torch.testing.assert_close(before, whole)
    for kind in ("forward", "reverse", "top_k"):
        assert divergence(student, student, all_rows, kind=kind)[0].abs() < 1e-6
