"""Rounding in training: values, and gradients that pass it."""

import pytest
import torch

from kernels.straight_through import int8_tokens, lsq, lsq_range, lsq_start, ternary


def test_ternary_weights_are_the_papers_and_pass_gradients() -> None:
    weight = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(0))
    weight.requires_grad_()
    rounded = ternary(weight)
    error = (rounded - weight).detach()
    assert float(error.norm() / weight.detach().norm()) == pytest.approx(0.5134, abs=5e-4)
    assert float((rounded == 0).double().mean()) == pytest.approx(0.310, abs=1e-3)
    assert torch.equal(rounded.unique(), weight.abs().mean() * torch.tensor([-1.0, 0.0, 1.0]))
    rounded.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert torch.equal(ternary(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_activations_have_a_scale_for_each_token() -> None:
    x = torch.tensor([[127.0, -63.4, 0.6], [1.0, 0.5, -0.25], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[127.0, -63.0, 1.0], [1.0, 64 / 127, -32 / 127], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(int8_tokens(x), expected)


@pytest.mark.parametrize("bits", [2, 4])
def test_lsq_has_the_gradients_of_the_paper(bits: int) -> None:
    """What is rounded is constant between ties: there finite differences are those of q and w / s.

    So q s has the slope q in s, of which the paper takes off w / s where w is inside the range.
    """
    generator = torch.Generator().manual_seed(0)
    low, high = lsq_range(bits)
    step = torch.tensor([0.5]).requires_grad_()
    codes = torch.randint(low - 2, high + 3, (6, 8), generator=generator)
    offsets = 0.8 * torch.rand(6, 8, generator=generator) - 0.4
    weight = (0.5 * (codes + offsets)).requires_grad_()
    outer = torch.randn(6, 8, generator=generator)
    (lsq(weight, step, bits) * outer).sum().backward()
    with torch.no_grad():
        ahead, behind = ((lsq(weight, step + d, bits) * outer).sum() for d in (1e-3, -1e-3))
        scaled = weight / step
        inside = (scaled > low) & (scaled < high)
        slope = (ahead - behind) / 2e-3 - (outer * scaled * inside).sum()
        expected = slope / (weight.numel() * high) ** 0.5
    assert weight.grad is not None
    torch.testing.assert_close(step.grad, expected.view(1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(weight.grad, outer * inside)
    start = 2 * weight.detach().abs().mean().view(1) / high**0.5
    torch.testing.assert_close(lsq_start(weight.detach(), bits), start)
