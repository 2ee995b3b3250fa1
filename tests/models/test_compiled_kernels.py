"""Compiled references: in use once a recipe is prepared, dispensable without a compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.compilation import current_compiler, eager, use_compiler
from models.compiled_kernels import compile_for_cpu, compile_kernels
from tests.conftest import ROOT


def test_what_cannot_be_compiled_runs_eagerly_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def reads_a_number(x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x if float(x.sum()) > 0 else -x,)

    with pytest.warns(UserWarning, match="reads_a_number runs uncompiled"):
        function = compile_for_cpu(reads_a_number, "reads_a_number", (torch.ones(4),), ({0: "r"},))
    assert function is reads_a_number


def test_the_environment_keeps_the_references_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        monkeypatch.setenv("ESPALIER_EAGER_KERNELS", "1")
        compile_kernels()
        assert current_compiler() is eager
        monkeypatch.delenv("ESPALIER_EAGER_KERNELS")
        compile_kernels()
        assert current_compiler() is compile_for_cpu
    finally:
        use_compiler(eager)


def test_without_a_compiler_the_eager_reference_runs_and_no_file_is_written(tmp_path: Path) -> None:
    code = """
import torch
from kernels.emulate import emulate
from kernels.quantiser import Quantiser
quantiser, x = Quantiser(format="nvfp4", block=(1, 16)), torch.randn(32, 64).bfloat16()
assert torch.equal(emulate(x, quantiser, 1).values, quantiser(x).scaled().bfloat16())
"""
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    assert not list(tmp_path.glob("espalier-kernels-*"))
