"""Kill a run anywhere, run the same command again: bit-identical weights and metrics."""

import gzip
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runner.learn.trainer import Trainer
from runner.machine import storage
from runner.machine.errors import CheckpointError
from runner.machine.ranks import Ranks
from runner.records import checkpoint, checkpoint_folder, journal, metrics
from runner.records.cells import Cell, freeze_cell, make_cells
from tests.command_server import ROOT, Command
from tests.workers import logged, start_worker

Compose = Callable[..., dict[str, Any]]
HARD = [
    "model.dropout=0.1",
    "train.micro_batch=2",
    "train.checkpoint.every_steps=5",
    "train.steps=30",
]


def _wait_for_step(cell: Cell, step: int, process: "Command | subprocess.Popen[bytes]") -> None:
    while process.poll() is None:
        lines = storage.read_lines(cell.folder / "metrics.jsonl")
        if any(line.get("step", 0) >= step for line in lines):
            return
        time.sleep(0.002)


def _weights(cell: Cell) -> dict[str, torch.Tensor]:
    newest = checkpoint_folder.newest(cell.folder / "checkpoints")
    assert newest is not None
    return load_file(newest / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen",
    [
        ["optim=adamw", "data.num_workers=0"],
        ["optim=muon", "data.num_workers=2"],
        ["optim=adamw", "data.num_workers=2", "precision=nvfp4_all_layers", "precision.pad=true"],
        ["optim=muon", "data.num_workers=0", "precision=fp8_delayed"],
        ["model=hybrid", "model.depth=2", "model.width=48", "model.parts.e.balance=bias"],
    ],
    ids=["adamw", "muon, loader processes", "nvfp4", "fp8, delayed scaling", "hybrid"],
)
def test_killed_run_resumes_bit_identically(
    chosen: list[str], compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "precision=nvfp4_all_layers" in chosen:  # with compiled kernels
        monkeypatch.delenv("ESPALIER_EAGER_KERNELS")
    overrides = [*chosen, *HARD]
    (whole,) = make_cells([("", compose(*overrides, f"root={tmp_path / 'whole'}"))])
    (broken,) = make_cells([("", compose(*overrides, f"root={tmp_path / 'broken'}"))])
    assert whole.fingerprint == broken.fingerprint
    assert start_worker(whole).wait() == 0
    for step in (3, 8, 16):
        process = start_worker(broken)
        _wait_for_step(broken, step, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start_worker(broken).wait() == 0
    assert broken.state == "finished"
    assert len(journal.attempts(broken.folder)) == 4
    a, b = _weights(whole), _weights(broken)
    assert all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())
    # Master weights are fp32 under any recipe; an n-gram memory's table of the vocabulary is not.
    other = [name for name, tensor in a.items() if tensor.dtype != torch.float32]
    assert all(name.endswith(".canonical") for name in other), other
    assert logged(whole) == logged(broken)


@pytest.mark.slow
def test_an_evaluation_that_a_run_died_in_is_made_up_for(compose: Compose) -> None:
    dying = "+eval.also.dying._target_=tests.faults.DyingEvaluation"
    (cell,) = make_cells([("", compose("train.steps=6", "eval.every=3", dying))])
    for ended in (-signal.SIGKILL, -signal.SIGKILL, 0):
        assert start_worker(cell).wait() == ended
    evaluated = [row for row in metrics.read(cell.folder) if "val_loss" in row]
    assert [(row["step"], row["dying/step"]) for row in evaluated] == [(3, 3), (6, 6)]
    assert len(list((cell.folder / "evals").iterdir())) == 1


@pytest.mark.slow
def test_sigterm_saves_and_asks_to_be_resumed(compose: Compose) -> None:
    (cell,) = make_cells([("", compose("train.steps=100000", "train.checkpoint.keep_best=false"))])
    freeze_cell(cell)
    # A real process: what a job's script starts.
    command = [sys.executable, "-m", "runner.launch.worker", str(cell.folder)]
    process = subprocess.Popen(command, cwd=ROOT)
    _wait_for_step(cell, 5, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert cell.state == "interrupted"
    assert checkpoint_folder.newest(cell.folder / "checkpoints") is not None


def test_a_run_stopped_before_its_first_step_goes_on(compose: Compose, tmp_path: Path) -> None:
    weights = []
    for name, stops in (("whole", [False]), ("stopped", [True, False])):
        (cell,) = make_cells([("", compose("optim=muon", f"root={tmp_path / name}"))])
        freeze_cell(cell)
        for stop in stops:
            attempt = journal.claim(cell.folder)
            assert attempt is not None
            writer = journal.Journal(cell.folder, attempt)
            outcome = Trainer(cell, cell.inputs, writer, Ranks("cpu")).fit(lambda stop=stop: stop)  # type: ignore[misc]
            assert outcome == ("interrupted" if stop else "finished")
            writer.event(outcome)
            writer.close()
        weights.append(_weights(cell))
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


def test_a_damaged_checkpoint_is_passed_over(compose: Compose) -> None:
    (cell,) = make_cells([("", compose(*HARD))])
    assert start_worker(cell).wait() == 0
    saved = checkpoint_folder.listing(cell.folder / "checkpoints")
    file = saved[-1] / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged"):
        assert checkpoint_folder.newest(cell.folder / "checkpoints") == saved[-2]
    other = cell.config.model.__class__(depth=1, width=8, num_heads=1).build(257, 0)
    with pytest.raises(CheckpointError, match="another model"):
        checkpoint.load_weights(saved[-2], other)


def test_divergence_is_a_result(compose: Compose) -> None:
    overrides = ["optim.lr=1e18", "train.clip=null", "schedule=constant", "train.steps=200"]
    (cell,) = make_cells([("", compose(*overrides))])
    assert start_worker(cell).wait() == 0
    assert cell.state == "diverged"


def test_torn_line_is_ignored_and_truncated(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n{"st')
    assert storage.read_lines(file) == [{"step": 1}]
    attempt = journal.claim(tmp_path)
    assert attempt is not None
    writer = journal.Journal(tmp_path, attempt)
    writer.metrics(2, {"loss": 1.0})
    writer.close()
    assert [line["step"] for line in map(json.loads, file.read_text().splitlines())] == [1, 2]
    assert journal.claim(tmp_path) is None  # this process holds it


def test_a_later_leg_of_a_job_takes_over_and_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that SLURM lost may run on: its leg must not fight with the one that replaced it."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for leg, claimed in (
        ("0", True),
        ("2", True),
        ("0", False),
        ("1", False),
        ("10", True),
        ("2", False),
    ):
        monkeypatch.setenv("SLURM_RESTART_COUNT", leg)
        assert (journal.claim(tmp_path) is not None) == claimed, leg
    monkeypatch.setenv("SLURM_JOB_ID", "8")  # another job looks at the process: it is alive
    assert journal.claim(tmp_path) is None


@pytest.mark.parametrize("kind", ["ema", "last"])
def test_the_average_is_what_its_name_says(kind: str, compose: Compose) -> None:
    from runner.learn.optim.average_config import AverageConfig

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    average = AverageConfig(kind=kind, decay=0.5, every=2, count=3).build(model)  # type: ignore[arg-type]
    assert average is not None
    seen = []
    for step in range(1, 11):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        seen.append(model.weight.detach().clone())
        average.update(step)
    expected = seen[0]
    for step, weight in enumerate(seen[1:], start=2):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    if kind == "last":
        expected = torch.stack([seen[5], seen[7], seen[9]]).mean(dim=0)
    with average.in_place():
        torch.testing.assert_close(model.weight.detach(), expected)
    assert torch.equal(model.weight, seen[-1])
    again = AverageConfig(kind=kind).build(model)  # type: ignore[arg-type]
    assert again is not None
    again.load(average.tensors())
    with again.in_place():
        torch.testing.assert_close(model.weight.detach(), expected)


@pytest.mark.slow
def test_compiled_and_recomputed_steps_match_eager_ones(compose: Compose, tmp_path: Path) -> None:
    """Compilation fuses roundings: losses agree to 1e-4; recomputed steps are bit-identical."""
    metrics = {}
    for name in ("eager", "compile", "activation_checkpointing"):
        flag = [] if name == "eager" else [f"train.{name}=true"]
        (cell,) = make_cells([("", compose("model.dropout=0.1", *flag, f"root={tmp_path / name}"))])
        assert start_worker(cell).wait() == 0
        metrics[name] = logged(cell)
        seconds = [
            r["compile_s"]
            for r in storage.read_lines(cell.folder / "metrics.jsonl")
            if "compile_s" in r
        ]
        assert bool(seconds) == (name == "compile")
        assert all(s > 0 for s in seconds)
    assert metrics["activation_checkpointing"] == metrics["eager"]
    for key, value in metrics["eager"].items():
        assert metrics["compile"][key] == pytest.approx(value, rel=1e-4), key


def test_profile_writes_a_trace(compose: Compose) -> None:
    (cell,) = make_cells([("", compose("train.profile=true"))])
    assert start_worker(cell).wait() == 0
    with gzip.open(journal.attempts(cell.folder)[0] / "trace.json.gz") as stream:
        names = {event.get("name") for event in json.load(stream)["traceEvents"]}
    assert "aten::mm" in names
