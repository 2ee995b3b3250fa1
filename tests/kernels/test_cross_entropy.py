import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from kernels import cross_entropy
from kernels.cross_entropy import IGNORE, linear_cross_entropy


@pytest.mark.parametrize("ignored", [slice(3, 4), slice(1, 8)])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_loss_and_gradients_equal_torch_in_float64(
    softcap: float | None, z_loss: float, ignored: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against autograd through full logits; the loss is summed in fp32, so 1e-6 relative."""
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", 3 * 11)  # several ragged chunks
    torch.manual_seed(0)
    x = torch.randn(10, 4, requires_grad=True)
    w = torch.randn(11, 4, requires_grad=True)
    y = torch.randint(0, 11, (10,))
    y[ignored] = IGNORE
    total, nll = linear_cross_entropy(x, w, y, scale=0.7, softcap=softcap, z_loss=z_loss)
    (total / 3).backward()
    x2, w2 = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    logits = 0.7 * x2 @ w2.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    rows = F.cross_entropy(logits, y, reduction="none", ignore_index=IGNORE)
    z = z_loss * (logits.logsumexp(-1).square() * (y != IGNORE)).sum()
    ((rows.sum() + z) / 3).backward()
    torch.testing.assert_close(nll.double(), rows.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), x2.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(w.grad.double(), w2.grad, rtol=1e-4, atol=1e-6)


def test_a_second_backward_pass_is_refused_not_wrong() -> None:
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    loss, _ = linear_cross_entropy(x, w, torch.tensor([0, 1, 2, 3]))
    (loss * 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss * 2).backward()


def test_without_gradients_a_head_costs_its_logits_only() -> None:
    """A validation's: no product for the gradient of a parameter."""
    x, w = torch.randn(8, 4), torch.randn(16, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear_cross_entropy(x, w, torch.arange(8))
    assert counter.get_total_flops() == 2 * 8 * 4 * 16


def test_the_loss_is_no_tensor_that_was_changed_in_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch.compile of torch 2.11 passes zeros on as the gradients of such an output."""
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", 3 * 5)  # two chunks
    x, w = torch.randn(6, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    for weights in (None, torch.ones(6)):
        loss, _ = linear_cross_entropy(x, w, torch.zeros(6, dtype=torch.int64), weights=weights)
        assert loss._version == 0
