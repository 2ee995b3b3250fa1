"""The Triton kernels by Triton's interpreter, in a process where it is switched on at import."""

import os
import subprocess
import sys

import pytest
import torch

CODE = """
import torch
from kernels.emulate import Quantiser
from kernels.format_names import HADAMARD_SIZES
from kernels.hadamard import hadamard, hadamard_matrix
from kernels.quantise import quantise_nvfp4
from kernels.triton_nvfp4 import amax, dequantise, quantise, quantise_both
from tests.kernels.oracles import KINDS, inputs

def dice(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

def check(found, x, block, bits, headroom, *where):
    wanted = Quantiser(format="nvfp4", block=block, sr_headroom=headroom)(x, bits)
    if torch.isnan(wanted.numerator):  # inf - inf in a transform: the product is NaN by its factor
        assert torch.isnan(found[1]), where
        return
    assert torch.equal(found[0], wanted.scaled().bfloat16()), where
    assert torch.equal(found[1], wanted.numerator), where

# Rows 2**26 bytes apart: the last begins 2**31 bytes after the first. Few pages are ever touched.
far = torch.empty_strided((33, 64), (1 << 26, 1), dtype=torch.int8)
far.zero_()
far[32, 5] = 7
assert amax(far) == 7
values, numerator = quantise(far, (1, 16))
assert values[32, 5] != 0
assert values.count_nonzero() == 1

for kind in KINDS:
    for shape in ((48, 112), (16, 64), (96, 16)):
        x, bits = inputs(kind, *shape), dice(shape, 1)
        assert amax(x) == x.abs().max()
        packed = quantise_nvfp4(x)
        assert torch.equal(dequantise(*packed.packed(), packed.outer), packed.dequantise()), kind
        for block in ((1, 16), (16, 1), (16, 16)):
            for given in (None, bits):
                for headroom in (1.0, 17 / 16):
                    found = quantise(x, block, given, headroom=headroom)
                    check(found, x, block, given, headroom, kind, shape, block)
    for size in HADAMARD_SIZES:
        shape = (2 * size, 80)
        x, matrix = inputs(kind, *shape), hadamard_matrix(size)
        for given in (None, (dice(shape, 1), dice(shape, 2))):
            rows, columns = quantise_both(x, matrix, given)
            one, two = given or (None, None)
            check(rows, x, (1, 16), one, 1.0, kind, size)
            check(columns, hadamard(x, matrix, 0), (16, 1), two, 1.0, kind, size)
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU itself: tests/gpu")
def test_triton_nvfp4_is_the_reference_bit_for_bit() -> None:
    pytest.importorskip("triton", reason="needs triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
