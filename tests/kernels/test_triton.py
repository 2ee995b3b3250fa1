"""The Triton kernels by Triton's interpreter and compiler, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CODE = """
import torch
from tests.kernels.oracles import KINDS
from tests.kernels.triton_cases import SHAPES, check_blocks, check_far_rows, check_float8
from tests.kernels.triton_cases import check_hadamard, check_quantise, check_quantise_both
from tests.kernels.triton_cases import check_losses, check_words

cpu = torch.device("cpu")
check_far_rows(cpu)
check_words(cpu)
check_quantise("inf", SHAPES[1], cpu)
for kind in KINDS:
    check_quantise(kind, SHAPES[0], cpu)
for shape in SHAPES[1:]:
    check_quantise("outliers", shape, cpu)
for kind in ("wide", "inf"):
    check_hadamard(kind, cpu)
    check_quantise_both(kind, cpu)
for kind in ("zeros", "inf"):
    check_blocks(kind, cpu)
    check_float8(kind, cpu)
check_float8("wide", cpu)
check_losses(cpu)
"""

RECURRENCES = """
import torch
from kernels import state_pass
from kernels.recurrence import recurrence
from tests.kernels.recurrence_cases import KINDS, check_pass, check_recurrence, inputs

cpu = torch.device("cpu")
state_pass._compare(cpu)
state_pass.triton_agrees = lambda device, compare: True
check_pass(cpu)
for kind in KINDS:
    check_recurrence(kind, (2, 2, 23, 5, 4), 8, cpu)

given = inputs("delta", (2, 2, 23, 5, 4))
compiled = torch.compile(recurrence, backend="aot_eager", fullgraph=True)
for a, b in zip(compiled(**given, chunk=8), recurrence(**given, chunk=8), strict=True):
    assert torch.equal(a, b)
"""


HOPPER = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import triton_blocks, triton_hadamard, triton_logit_rows, triton_nvfp4 as kernels
from kernels import triton_philox, triton_state_pass
from kernels.operand_pairs import FUSED_HADAMARD

BF16, SIZES = "*bf16", ["i32"] * 4

def compile_for_hopper(function, types, constants, num_warps=4, shared_kb=48):
    names = [name for name in function.arg_names if name not in constants]
    signature = dict(zip(names, types, strict=True)) | dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in function.arg_names}
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=places)
    options = {"num_warps": num_warps}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert len(done.asm["cubin"]) < 256 << 10, (function, constants)
    assert done.metadata.shared <= shared_kb << 10, (function, constants)

DICE = ["*i64", "*i32", "i32", "i32", "i32"]
for size in FUSED_HADAMARD[::2]:
    amax = [BF16, BF16, "*i32", *SIZES]
    compile_for_hopper(kernels._amax, amax, {"ROWS": size, "TURN": True})
    factors = ["*fp32"] * 3
    both = [BF16, BF16, *DICE, "i32", "*i16", "*i16", "*u8", "*u8", *factors, *SIZES, "fp32"]
    constants = {"ROWS": size, "TURN": True, "STOCHASTIC": True, "KEEP": size == 16}
    compile_for_hopper(kernels._quantise_both, both, constants, 4 if size <= 32 else 8)
for rows, cols in ((1, 16), (16, 1), (16, 16)):
    constants = {"ROWS": 32, "BLOCK_ROWS": rows, "BLOCK_COLS": cols, "STOCHASTIC": True}
    one = [BF16, *DICE, "*i16", "*u8", "*fp32", "*fp32", *SIZES, "fp32"]
    compile_for_hopper(kernels._quantise, one, constants)
alone = [BF16, BF16, "*i16", "i32", *SIZES]
compile_for_hopper(triton_hadamard._hadamard, alone, {"SIZE": 128})
for block, rule, stochastic in (((1, 32), "rceil", True), ((128, 128), "fp32", False)):
    rows, cols = max(32, block[0]), max(64, block[1])
    constants = {"ROWS": rows, "COLS": cols, "BLOCK_ROWS": block[0], "BLOCK_COLS": block[1]}
    constants |= {"RULE": rule, "MAX": 6.0, "EMIN": 0, "EMAX": 2, "MANTISSA": 1}
    scales = "*fp32" if rule == "fp32" else "*u8"
    types = [BF16, *DICE, "*i16", "*fp32", scales, *SIZES, *["fp32"] * 4]
    warps = 4 if rows * cols <= 4096 else 8
    constants["STOCHASTIC"] = stochastic
    compile_for_hopper(triton_blocks._blocks, types, constants, warps)
constants = {"ROWS": 32, "COLS": 64, "MAX": 448.0, "EMIN": -6, "MANTISSA": 3}
types = [BF16, "*i16", "*fp32", "*fp32", *SIZES]
compile_for_hopper(triton_blocks._tensor, types, constants)
constants |= {"ROWS": 64, "ALONG": True, "ACROSS": True}
types = [BF16, "*u8", "*u8", "*fp32", "*fp32", *SIZES]
compile_for_hopper(triton_blocks._float8, types, constants)
compile_for_hopper(triton_philox._words, ["*i64", "*i32", "*i32", "i32", "i32"], {})
packed = ["*u8", "*u8", "*i16", "i32", "i32"]
compile_for_hopper(kernels._expand, packed, {"ROWS": 32, "BLOCK_ROWS": 16, "BLOCK_COLS": 1})
row, numbers = {"COLS": 4096, "CAPPED": True}, ["i32", "i32", "fp32", "fp32"]
compile_for_hopper(triton_logit_rows._nll, [BF16, "*i64", "*fp32", "*fp32", *numbers], row, 8)
types = [BF16, "*i64", *["*fp32"] * 3, *numbers]
compile_for_hopper(triton_logit_rows._gradient, types, row, 8)
scan = {"ROWS": 16, "COLS": 64, "BACKWARD": True, "ERASES": False, "STAGES": 3, "erase": None}
compile_for_hopper(triton_state_pass._pass, ["*fp32"] * 5 + SIZES, scan)
for rows, stages, warps in ((64, 3, 4), (128, 2, 8)):
    delta = {"ROWS": rows, "COLS": 16, "BACKWARD": False, "ERASES": True, "STAGES": stages}
    types = ["*fp32"] * 6 + SIZES
    compile_for_hopper(triton_state_pass._pass, types, delta, warps, shared_kb=96)
"""


@pytest.mark.slow
def test_the_kernels_compile_for_hopper_without_a_gpu(tmp_path: Path) -> None:
    """By the assembler that Triton brings; a product that is unrolled too far shows in the size."""
    pytest.importorskip("triton", reason="needs triton")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", HOPPER], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU itself: tests/gpu")
def test_triton_nvfp4_is_the_reference_bit_for_bit() -> None:
    _interpret(CODE)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU itself: tests/gpu")
def test_a_recurrence_whose_states_a_kernel_passes_is_that_chunk_after_chunk() -> None:
    """Outputs, states and gradients, second ones of the pass too; compiled, the same bits."""
    _interpret(RECURRENCES)


def _interpret(code: str) -> None:
    pytest.importorskip("triton", reason="needs triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
