"""The plan: predicted memory against measured, what cannot run, drift, disk and time."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.learn.setup import set_up
from runner.machine import environment, storage
from runner.machine.errors import ConfigError, StorageError
from runner.machine.ranks import Ranks
from runner.records.cells import Cell, freeze_cell, load_cell, make_cells
from runner.records.config import validate
from runner.views import disk
from runner.views.plan import Planned, check, plan
from runner.views.speed import (
    Speed,
    expected_flops_per_s,
    speed_of,
    speeds,
    tokens_per_s,
)
from tests.command_server import ROOT

Run = Callable[..., subprocess.CompletedProcess[str]]
LAUNCH = """
import sys
from pathlib import Path
from runner.launch.launch import launch
from runner.launch.local import Local
from runner.launch.policy import Policy
from runner.records.cells import load_cell

assert launch([load_cell(Path(name)) for name in sys.argv[1:]], Local(1), Policy()) == 0
"""
# None of these was used to fit the constants of runner/learn/memory.py.
HELD_OUT = [
    ["model=gpt_nano", "train.batch_size=64"],
    ["model=gpt_micro", "train.batch_size=24", "model.dropout=0.1"],
    ["model=gpt_mini", "train.batch_size=32", "precision=bf16"],
    ["model=gpt_mini", "train.batch_size=32", "train.micro_batch=8"],
    ["model=gpt_mini", "model.depth=10", "optim=muon", "train.batch_size=16"],
    ["model=gpt_10m", "train.batch_size=4", "train.average.kind=ema"],
    ["model=gpt_10m", "train.batch_size=12", "train.activation_checkpointing=true"],
    ["model=gpt_10m", "model.width=512", "model.num_heads=8", "train.batch_size=4"],
    ["model=gpt_10m", "+model/adapter=qlora", "train.batch_size=8"],
    ["model=gpt_10m", "+model/adapter=dora", "train.batch_size=8"],
]


@pytest.mark.slow
def test_memory_is_predicted_where_shapes_depend_on_what_a_router_chooses(
    compose: Callable[..., dict[str, Any]],
) -> None:
    """For twice the sequence more of it, with a capacity too."""
    changes = ["model=hybrid", "model.width=48", "+model.parts.e.capacity_factor=1.25"]
    found = []
    for seq in (64, 512):
        node = compose(*changes, f"train.sequence_length={seq}")
        found.append(Planned(make_cells([("", node)])[0], {}).memory_bytes)
    assert None not in found
    assert found[1] > found[0] + 10e6  # type: ignore[operator]


@pytest.mark.parametrize("task", ["diffusion", "diffusion_infill"])
def test_memory_is_predicted_of_tasks_that_add_tokens_and_hide_others(
    compose: Callable[..., dict[str, Any]], task: str
) -> None:
    """About that of predicting next tokens: the model is as large, and reads as much."""
    length = "train.sequence_length=256"
    nodes = compose(length), compose(length, f"task={task}", "model.causal=false")
    next_tokens, own = (Planned(make_cells([("", n)])[0], {}).memory_bytes for n in nodes)
    assert own is not None
    assert 0.9 < own / (next_tokens or 0) < 1.3


def test_a_cell_that_trains_no_step_takes_the_memory_of_reading_and_keeps_weights_alone(
    compose: Callable[..., dict[str, Any]],
) -> None:
    common = ["train.sequence_length=512", "train.batch_size=32", "eval.batch_size=1"]
    found = []
    for steps in (0, 2):
        cells = make_cells([("", compose(*common, f"train.steps={steps}"))])
        found.append(Planned(cells[0], {}))
    memory = [row.memory_bytes or 0 for row in found]
    assert 0 < memory[0] < memory[1] - 50e6
    parameters = found[0].cell.config.model.num_parameters(257)
    assert [row.disk_bytes for row in found] == [4 * parameters, 12 * 4 * parameters]
    node = compose("work=evaluate") | {"inputs": {"init": {"runs": ["0123456789abcdef"]}}}
    assert Planned(make_cells([("", node)])[0], {}).disk_bytes == 0


@pytest.mark.slow
def test_memory_is_predicted_within_15_percent(compose: Callable[..., dict[str, Any]]) -> None:
    common = [
        "train.sequence_length=256",
        "train.steps=2",
        "eval.every=9",
        "eval.tokens=256",
        "eval.batch_size=1",
    ]
    cells = make_cells(
        [(" ".join(c), compose(*common, *c, f"seed={n}")) for n, c in enumerate(HELD_OUT)]
    )
    # A process of its own: after other tests this one, and what it forks, holds more.
    for cell in cells:
        freeze_cell(cell)
    folders = [str(cell.folder) for cell in cells]
    subprocess.run([sys.executable, "-c", LAUNCH, *folders], cwd=ROOT, check=True)
    ratios = {}
    for cell in cells:
        predicted = Planned(cell, {}).memory_bytes
        rows = storage.read_lines(cell.folder / "metrics.jsonl")
        measured = max(row.get("peak_memory_bytes", 0) for row in rows)
        assert predicted is not None
        ratios[cell.label] = predicted / measured
    assert len(ratios) == len(HELD_OUT)
    assert all(0.85 < ratio < 1.15 for ratio in ratios.values()), str(ratios)


@pytest.fixture
def cell(compose: Callable[..., dict[str, Any]]) -> Callable[..., Cell]:
    """Return the cell of some overrides."""
    return lambda *overrides: make_cells([("it", compose(*overrides))])[0]


def test_a_foreign_model_that_miscounts_itself_is_refused_before_it_runs_and_when_built(
    compose: Callable[..., dict[str, Any]],
) -> None:
    node = compose("train.steps=1", "eval.sample_tokens=0")
    node["model"] = {"_target_": "tests.models.test_sizes.TiedConfig", "parameters": 99}
    (wrong,) = make_cells([("it", node)])
    with pytest.raises(ConfigError, match=r"num_parameters\(257\) gives 99"):
        check([wrong])
    assert Planned(wrong, {}).state == "invalid"
    with pytest.raises(ConfigError, match=r"model: TiedConfig.num_parameters\(257\) gives 99"):
        set_up(wrong, {}, Ranks("cpu"), None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["resources.mem_gb=0.1"],
            "needs about 0.4 GB but resources.mem_gb=0.1 has 0.1; lower train.micro_batch",
        ),
        (
            [
                "resources.gpu=H100",
                "resources.gpus=1",
                "precision=nvfp4",
                "precision.backend=native",
            ],
            r"NVFP4BlockScaling needs compute capability 10\.0, not 9\.0; "
            r"use precision\.backend=auto",
        ),
        (["precision=mxfp8", "precision.backend=native", "train.device=cpu"], "only a GPU has"),
        (
            ["resources.gpu=V100", "precision=bf16"],
            "precision.compute=bf16 is not supported by resources.gpu=V100",
        ),
        (
            [
                "resources.gpu=A100",
                "resources.gpus=1",
                "model=gpt2_124m",
                "train.batch_size=4096",
                "train.sequence_length=512",
            ],
            "resources.gpu=A100 has 80",
        ),
    ],
)
def test_what_cannot_run_is_refused_with_the_key(
    cell: Callable[..., Cell], overrides: list[str], message: str
) -> None:
    made = cell(*overrides)
    assert Planned(made, {}).state == "invalid"
    with pytest.raises(ValueError, match=message):
        check([made])
    assert "invalid it: " in plan([made], time_limited=False)[1].replace("[red]", "").replace(
        "[/]", ""
    )


def test_a_batch_that_ranks_cannot_share_is_refused(compose: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"train\.batch_size=4 over 3 processes is not divisible"):
        validate(compose("resources.processes=3"))


@pytest.mark.parametrize("name", ["batch_size", "micro_batch", "log_every"])
def test_a_size_below_one_is_refused(name: str, compose: Callable[..., dict[str, Any]]) -> None:
    for value in (0, -2):
        with pytest.raises(ValueError, match=rf"train\.{name}={value} must be at least 1"):
            validate(compose(f"train.{name}={value}"))


@pytest.mark.slow
def test_a_refused_cell_keeps_all_from_running(espalier: Run, tmp_path: Path) -> None:
    done = espalier("-m", "model.width=24,4096", "resources.mem_gb=1")
    assert done.returncode == 1
    assert "width=4096: needs about" in done.stderr
    assert not list(tmp_path.glob("runs/*"))
    huge = espalier("-m", "model.width=65536", "model.num_heads=512", "model.depth=40")
    assert "this machine has" in huge.stderr


def _quotas(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put commands on PATH that answer as `quota` and `lfs` do: test machines have no quotas."""
    commands = {
        "quota": "Disk quotas for user ada (uid 1000):\n"
        "     Filesystem  blocks  quota  limit  grace\n"
        "$mount  9000  9500  9999  0  12  0  0  0",
        "lfs": "$mount\n        1010*    1000    1020  6d23h59m59s  12  0  0  -",
    }
    (folder / "bin").mkdir()
    for name, answer in commands.items():
        file = folder / "bin" / name
        file.write_text(f'#!/bin/sh\nfor mount; do :; done\necho "{answer}"\n')
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")


def test_time_disk_and_drift_are_told(
    espalier: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert espalier("-m", "seed=1", "name=d").returncode == 0
    (folder,) = tmp_path.glob("runs/*")
    done = load_cell(folder)
    known = speeds(tmp_path, {Planned(done, {}).speed_key})
    assert len(known) == 1
    row = Planned(done, known)
    assert row.state == "finished"
    assert row.seconds is not None
    assert row.seconds[0] == row.seconds[1] > 0
    saved = sum(f.stat().st_size for f in folder.glob("checkpoints/*/*.safetensors"))
    assert row.disk_bytes is not None
    assert saved <= row.disk_bytes
    record = folder / "attempts/0001/environment.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"torch": "2.11.0"}))
    assert Planned(done, {}).state == "drifted"
    assert str(environment.torch_drift(folder)).startswith("torch 2.11.0 then")
    again = espalier("-m", "seed=1", "name=d")
    kept = f"1 finished cells are kept but drifted, {folder.name[:6]}: torch 2.11.0 then"
    assert kept in again.stderr
    _quotas(tmp_path, monkeypatch)
    assert disk.free_bytes(tmp_path) == 10 * 1024
    record.unlink()
    (folder / "attempts/0001/events.jsonl").unlink()
    assert "checkpoints may take" in plan([done], time_limited=False)[1]
    with pytest.raises(StorageError, match=r"lower train\.checkpoint\.keep_last"):
        check([done])


def _rows(rates: list[float], every: int, attempts: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """Rows of a run of 100 FLOPs a step: `rates` in FLOP/s, one each `every` steps."""
    tries = attempts or (1,) * len(rates)
    return [
        {"step": step, "flops": 100.0 * step, "flops_per_s": rate, "attempt": attempt}
        for step, rate, attempt in zip(range(every, 10**6, every), rates, tries, strict=False)
    ]


def test_the_first_steps_of_an_attempt_tell_no_speed() -> None:
    assert speed_of(_rows([1.0], every=1)) is None  # a smoke run of a step
    assert speed_of(_rows([1.0], every=500)) is None
    assert speed_of(_rows([1.0, 50.0, 25.0], every=10)) == Speed(100.0, 2000.0, 20.0 + 40.0)
    resumed = _rows([1.0, 50.0, 1.0, 25.0], every=10, attempts=(1, 1, 2, 2))
    assert speed_of(resumed) == Speed(100.0, 2000.0, 20.0 + 40.0)
    shown = [row | {"tokens_per_s": row["flops_per_s"]} for row in resumed]
    assert tokens_per_s(shown) == 37.5  # of 50 and 25
    assert tokens_per_s(shown[:1]) == 1.0  # all there is
    assert tokens_per_s(resumed) is None


def test_runs_count_by_their_length_and_those_nearest_in_size_are_asked() -> None:
    short, long = Speed(100.0, 10.0, 10.0), Speed(110.0, 9990.0, 990.0)
    assert expected_flops_per_s([short, long], 100.0) == pytest.approx(10.0)
    large = Speed(1e6, 1e9, 10.0)
    assert expected_flops_per_s([short, long, large], 2e6) == 1e8
    assert expected_flops_per_s([short, long, large], 50.0) == pytest.approx(10.0)
    assert expected_flops_per_s([], 50.0) is None


def test_a_named_gpu_without_runs_gets_a_range_of_time(cell: Callable[..., Cell]) -> None:
    made = cell(
        "resources.gpu=H100",
        "resources.gpus=2",
        "resources.processes=2",
        "model=gpt2_124m",
        "precision=bf16",
        "train.sequence_length=512",
        "train.steps=2000000",
    )
    seconds = Planned(made, {}).seconds
    assert seconds is not None
    assert seconds[1] / seconds[0] == pytest.approx(2.5)
    total = plan([made], time_limited=True)[1]
    assert "of GPU time" in total
    assert "outlast resources.timeout_min" in total
    assert "SLURM" not in plan([made], time_limited=False)[1]
