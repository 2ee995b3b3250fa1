"""Whether a kernel is taken does not depend on who asks first."""

from collections.abc import Callable

import pytest
import torch

from kernels.triton_check import triton_agrees

GPU = torch.device("cuda")  # nothing runs there: `compare` decides


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_kernel_is_compared_with_gradients_outside_autocast(
    mode: Callable[[], torch.inference_mode], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ESPALIER_EAGER_KERNELS", raising=False)

    def compare(device: torch.device) -> None:
        x = torch.ones(2, requires_grad=True)
        x.square().sum().backward()
        assert torch.equal(x.grad, torch.full((2,), 2.0))
        assert not torch.is_autocast_enabled("cuda")

    torch.set_autocast_enabled("cuda", True)
    try:
        with mode():
            assert triton_agrees(GPU, compare)
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_a_kernel_that_differs_is_passed_over_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ESPALIER_EAGER_KERNELS", raising=False)

    def compare(device: torch.device) -> None:
        raise ValueError("off by one")

    with pytest.warns(UserWarning, match="passed over, which is slower: off by one"):
        assert not triton_agrees(GPU, compare)
