"""The device of these tests: the GPU, or the CPU in a rehearsal of `make gpu`."""

import os

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
CPU = torch.device("cpu")
HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
# torch.compile's: only tracing is rehearsed.
COMPILER = "inductor" if HAS_GPU else "eager"
needs_gpu = pytest.mark.skipif(
    not HAS_GPU and not os.environ.get("ESPALIER_REHEARSAL"),
    reason="needs a CUDA GPU",
)
