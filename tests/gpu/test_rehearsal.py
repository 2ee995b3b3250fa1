"""`make gpu` on a machine without a GPU: every section runs, without Hydra and MLflow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.bench import gpu, gpu_training
from tests.command_server import ROOT

ABSENT = (
    "transformer_engine",
    "hydra",
    "omegaconf",
    "mlflow",
    "submitit",
    "datasets",
    "typer",
    "optuna",
    "beartype",
)


def _section(statement: str) -> gpu.Section:
    """Return a section that runs a Python statement once."""
    return gpu.Section("any", ("timeit", "-n", "1", "-r", "1", statement), 60)


def _run(section: gpu.Section, limit_s: float, folder: Path) -> dict[str, object]:
    report = gpu.Report(folder, "", [section])
    gpu.run_section(section, limit_s, folder / "gpu.log", report)
    (written,) = json.loads((folder / "gpu.json").read_text())["sections"]
    assert isinstance(written, dict)
    return written


def test_a_section_cut_at_its_limit_leaves_its_rows(tmp_path: Path) -> None:
    row = "print('{\"ms\": 3}', flush=True); import time; time.sleep(60)"
    written = _run(_section(row), 2.0, tmp_path)
    assert written["rows"] == [{"ms": 3}]
    assert written["state"] == "cut at 2 s"
    assert "| ms |\n| --- |\n| 3 |" in (tmp_path / "gpu.md").read_text()


def test_a_section_that_raises_has_failed(tmp_path: Path) -> None:
    assert _run(_section("1 / 0"), 60.0, tmp_path)["state"] == "failed (exit code 1)"
    assert "ZeroDivisionError" in (tmp_path / "gpu.log").read_text()


@pytest.mark.parametrize("form", ["{name} {outcome} [ 9%]", "[gw3] [ 61%] {outcome} {name} "])
def test_of_tests_the_outcomes_are_counted_and_failures_named(form: str, tmp_path: Path) -> None:
    """Those of one process, and those that several run."""
    names = {"a": "PASSED", "b[x y]": "FAILED", "c": "PASSED"}
    lines = [form.format(name=f"tests/gpu/t.py::{n}", outcome=o) for n, o in names.items()]
    written = _run(_section(f"print({chr(10).join(lines)!r})"), 60.0, tmp_path)
    failed = {"outcome": "failed", "test": "tests/gpu/t.py::b[x y]"}
    assert written["rows"] == [{"outcome": "2 passed, 1 failed"}, failed]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu itself runs there")
def test_without_a_gpu_every_section_is_rehearsed(tmp_path: Path) -> None:
    for name in ABSENT:
        (tmp_path / f"{name}.py").write_text("raise ImportError('not on a GPU machine')\n")
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.gpu", str(tmp_path / "out")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (tmp_path / "out" / "gpu.log").read_text()[-3000:]
    assert done.stdout.startswith("no CUDA GPU here: rehearsing on the CPU")
    assert len(list((tmp_path / "out").iterdir())) <= 8
    written = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert written["rehearsal"]
    assert [one["name"] for one in written["sections"]] == [one.name for one in gpu.sections()]
    for one in written["sections"]:
        assert one["state"] == "finished", one
        assert one["rows"], one


def test_the_tree_can_be_carried_to_a_gpu() -> None:
    """With wheels of 3 MB it has to fit into 64 MiB."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    files = [ROOT / name for name in listed.split("\0") if name]
    assert 1 << 20 < sum(f.stat().st_size for f in files if f.is_file()) < 60 << 20


@pytest.mark.parametrize("size", gpu_training.PEERS)
def test_the_models_that_are_compared_have_equally_many_weights(size: str) -> None:
    """Parameters too, but for nanoGPT's form at 950M: its norms and positions are others."""
    sides = {name: gpu_training.side(name, size)[0] for name in gpu_training.PEERS[size]}
    weights = {
        sum(
            p.numel()
            for name, p in model.named_parameters()
            if p.ndim > 1 and "position" not in name and "wpe" not in name
        )
        for model in sides.values()
    }
    assert len(weights) == 1
    if size == "950m":
        del sides["nanoGPT form"]
    assert len({sum(p.numel() for p in model.parameters()) for model in sides.values()}) == 1
