"""Stages: which cells are whose inputs, what a change reruns, what a longer run continues."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runner.grid.language import Stage, StageInput
from runner.grid.stages import in_order, link
from runner.machine import storage
from runner.machine.errors import ConfigError
from runner.records import checkpoint_folder, journal
from runner.records.cells import Cell, load_cell, make_cells
from tests.command_server import run
from tests.conftest import TINY

Run = Callable[..., subprocess.CompletedProcess[str]]
STAGES = (
    "hydra.sweeper.stages={pre:{params:{train.steps:12}},"
    "ft:{from:pre,match:[seed],params:{train.steps:6,eval.tokens:256,optim.lr:'1e-3,2e-3'}},"
    "ev:{from:ft,match:[seed,optim.lr],"
    "params:{train.steps:0,optim.lr:'1e-3,2e-3',eval.tokens:%d}}}"
)


def _after(stage: str, *match: str) -> Stage:
    """Return a stage that starts from the model of another one."""
    return Stage(inputs={"init": StageInput(stage=stage, match=match)})


def _cells(root: Path) -> dict[str, Cell]:
    rows = storage.read_lines(root / "sweeps/g/cells.jsonl")
    return {row["label"]: load_cell(root / "runs" / row["fingerprint"]) for row in rows}


def test_three_stages_run_in_order_and_a_changed_evaluation_reruns_itself_only(
    tmp_path: Path, text: Path
) -> None:
    # These belong to the stages here: a key of the command line would win over them.
    tiny = [a for a in TINY if not a.startswith(("train.steps", "eval.tokens"))]
    base = [*tiny, f"data.sources.0.path={text}", f"root={tmp_path}", "seed=1,2", "name=g"]

    def sweep(stages: str) -> subprocess.CompletedProcess[str]:
        return run("runner", "-m", *base, stages)

    first = sweep(STAGES % 256)
    assert first.returncode == 0, first.stderr
    cells = _cells(tmp_path)
    assert len(cells) == 10
    tuned = cells["ft: lr=0.001 seed=1"]
    assert tuned.inputs == {"init": (cells["pre: seed=1"].folder,)}
    pre, ft, ev = (
        _weights(cells[name].folder)
        for name in ("pre: seed=1", "ft: lr=0.001 seed=1", "ft: lr=0.002 seed=1")
    )
    assert not all(torch.equal(pre[k], ft[k]) for k in pre)
    assert not all(torch.equal(ft[k], ev[k]) for k in pre)
    evaluated = cells["ev: lr=0.001 seed=1"].folder
    assert not list(evaluated.glob("checkpoints/*"))
    assert _last(evaluated, "val_loss") == pytest.approx(_last(tuned.folder, "val_loss"), rel=1e-6)
    again = sweep(STAGES % 512)
    assert "10 cells (6 finished, 4 new); 4 to run" in again.stderr
    assert again.returncode == 0


@pytest.mark.slow
def test_a_longer_run_goes_on_where_the_shorter_ended(espalier: Run, tmp_path: Path) -> None:
    assert espalier("-m", "schedule.kind=constant", "schedule.warmup=0", "name=g").returncode == 0
    (trunk,) = tmp_path.glob("runs/*")
    more = ["schedule.kind=constant", "schedule.warmup=0", "train.steps=20", "name=g"]
    goes_on = [f"upstream.run={trunk.name[:7]}", "upstream.take=everything"]
    planned = [
        espalier("-m", *more, *start, "hydra.sweeper.dry_run=true") for start in (goes_on, [])
    ]
    flops, all_flops = (float(re.search(r"to run: (\S+) FLOPs", p.stdout)[1]) for p in planned)  # type: ignore[index]
    assert flops == pytest.approx(all_flops * 8 / 20, rel=0.02)
    longer = espalier("-m", *more, *goes_on)
    assert longer.returncode == 0, longer.stderr
    assert espalier("-m", *more).returncode == 0
    others = [folder for folder in tmp_path.glob("runs/*") if folder != trunk]
    (extended,) = (folder for folder in others if load_cell(folder).inputs)
    (uninterrupted,) = (folder for folder in others if not load_cell(folder).inputs)
    rows = storage.read_lines(extended / "metrics.jsonl")
    assert min(row["step"] for row in rows if "loss" in row) == 13
    one, two = _weights(extended), _weights(uninterrupted)
    assert all(torch.equal(one[name], two[name]) for name in one)
    short = espalier(
        "-m",
        "train.steps=12",
        "seed=0",
        "name=g",
        f"upstream.run={trunk.name}",
        "upstream.take=everything",
        "optim.lr=1e-5",
    )
    assert short.returncode == 1
    log = next(load_cell(f).folder for f in tmp_path.glob("runs/*") if journal.state(f) == "failed")
    assert "must exceed the 12 steps" in (log / "log.txt").read_text()


def test_what_starts_from_a_failed_cell_waits_and_says_so(espalier: Run, tmp_path: Path) -> None:
    stages = (
        "hydra.sweeper.stages={pre:{params:{model._target_:tests.faults.FaultyConfig,"
        "model.fault:raise}},ft:{from:pre,match:[seed],params:{train.steps:6}}}"
    )
    done = espalier("-m", "seed=1", "name=g", stages)
    assert done.returncode == 1
    assert "waits for" in done.stderr
    assert "which is failed" in " ".join(done.stderr.split())
    assert sorted(c.state for c in _cells(tmp_path).values()) == ["failed", "new"]


def test_an_ambiguous_match_is_refused(compose: Callable[..., dict[str, Any]]) -> None:
    pre = make_cells((f"s{n}", compose(f"seed={n}")) for n in (1, 2))
    points = [("it", compose("seed=1", "train.steps=3"))]
    made = {"pre": pre}
    message = r"it \(train\.clip=1\.0\) takes input init of 2 cells of pre"
    with pytest.raises(ConfigError, match=message):
        link("ft", _after("pre", "train.clip"), points, made)
    with pytest.raises(ConfigError, match="of 0 cells"):
        link("ft", _after("pre", "train.steps"), points, made)
    with pytest.raises(ConfigError, match=r"match: no key model\.wide"):
        link("ft", _after("pre", "model.wide"), points, made)
    (linked,) = link("ft", _after("pre", "seed"), points, made)
    assert linked[1]["inputs"]["init"]["runs"] == [pre[0].fingerprint]


def test_a_task_that_needs_its_input_finds_it_in_the_stage(
    compose: Callable[..., dict[str, Any]],
) -> None:
    pre = make_cells([("s", compose("seed=1"))])
    node = compose("seed=1", "task=grpo", "task.beta=0.1")
    with pytest.raises(ConfigError, match=r"set inputs\.init\.runs"):
        make_cells([("it", node)])
    (linked,) = link("rl", _after("pre", "seed"), [("it", node)], {"pre": pre})
    (cell,) = make_cells([linked])
    assert cell.config.inputs["init"].runs == (pre[0].fingerprint,)


def test_stages_come_after_those_of_their_inputs() -> None:
    stages = {"c": _after("b"), "b": _after("a"), "a": Stage()}
    assert [name for name, _ in in_order(stages)] == ["a", "b", "c"]
    with pytest.raises(ConfigError, match="x from y"):
        list(in_order({"x": _after("y")}))


def _weights(run: Path) -> dict[str, torch.Tensor]:
    saved = checkpoint_folder.newest(run / "checkpoints")
    assert saved is not None
    return load_file(saved / "model.safetensors")


def _last(run: Path, key: str) -> float:
    rows = [r for r in storage.read_lines(run / "metrics.jsonl") if key in r]
    return float(rows[-1][key])
