"""The product with 4-bit weights."""

import pytest
import torch

from kernels.int4_mm import fits_int4, has_int4, int4_linear, pack_int4


@pytest.mark.skipif(
    not has_int4(torch.device("cpu")), reason="torch's int4 kernel needs an x86 CPU with AVX"
)
def test_a_few_rows_times_int4_are_those_times_what_the_codes_stand_for() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (48, 64), generator=generator, dtype=torch.uint8)
    scales = torch.rand(48, 2, generator=generator).bfloat16().float()
    x = torch.randn(2, 1, 64, generator=generator).bfloat16()
    y = int4_linear(x, *pack_int4(codes, scales), 32)
    weight = (codes.float() - 8) * scales.repeat_interleave(32, 1)
    wanted = x.float() @ weight.T
    assert (y.dtype, y.shape) == (torch.bfloat16, (2, 1, 48))
    # Codes times scales are rounded to bf16, and so is the sum: 2**-9 each.
    assert float((y.float() - wanted).norm() / wanted.norm()) < 2**-7


def test_sizes_that_the_kernel_does_not_take_are_left_to_others() -> None:
    assert fits_int4(48, 64, 32)
    assert not fits_int4(48, 60, 30)
    assert not fits_int4(40, 64, 32)
