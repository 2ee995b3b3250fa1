import pytest
import torch

from kernels.newton_schulz import orthogonalize


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape), dtype=torch.float32))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_zero_stays_zero() -> None:
    assert torch.equal(orthogonalize(torch.zeros(3, 4)), torch.zeros(3, 4, dtype=torch.bfloat16))
