"""The Triton kernels by Triton's interpreter, in a process of its own: its switch is read at import."""

import os
import subprocess
import sys

import pytest
import torch

CODE = """
import torch
from kernels.emulate import Quantiser
from kernels.triton_nvfp4 import amax, quantise
from tests.kernels.oracles import KINDS, inputs
for kind in KINDS:
    for shape in ((48, 112), (16, 64), (96, 16)):
        x = inputs(kind, *shape)
        bits = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        assert amax(x) == x.abs().max()
        for block in ((1, 16), (16, 1), (16, 16)):
            for dice in (None, bits):
                for headroom in (1.0, 17 / 16):
                    values, numerator = quantise(x, block, dice, headroom=headroom)
                    how = Quantiser(format="nvfp4", block=block, sr_headroom=headroom)
                    wanted = how(x, dice)
                    assert torch.equal(values, wanted.scaled().bfloat16()), (kind, shape, block, dice is None, headroom)
                    assert torch.equal(numerator, wanted.numerator)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU itself: tests/gpu")
def test_triton_nvfp4_is_the_reference_bit_for_bit() -> None:
    pytest.importorskip("triton", reason="needs triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
