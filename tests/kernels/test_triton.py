"""The Triton kernels by Triton's interpreter, in a process where it is switched on at import."""

import os
import subprocess
import sys

import pytest
import torch

CODE = """
import torch
from tests.kernels.oracles import KINDS
from tests.kernels.triton_cases import SHAPES, check_far_rows, check_quantise, check_quantise_both

cpu = torch.device("cpu")
check_far_rows(cpu)
check_quantise("inf", SHAPES[1], cpu)
for kind in KINDS:
    for shape in SHAPES:
        check_quantise(kind, shape, cpu)
    check_quantise_both(kind, cpu)
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
