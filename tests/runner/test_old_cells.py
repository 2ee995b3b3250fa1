"""Runs of an earlier version keep their fingerprints and are read, shown, resumed and skipped.

`tests/fixtures/runs_2026_11` holds what commit 9bf7a13 wrote, and in cells.json the overrides that
it was given. These files are never regenerated: a failing test means that the code no longer reads
run folders that users have.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from typer.testing import CliRunner

from analysis.runs import from_folders
from runner.commands.cli import app
from runner.commands.composer import open_keys, to_plain
from runner.commands.hydra_plugin import register
from runner.grid.evaluation_cells import evaluation_cells
from runner.machine.storage import read_lines
from runner.records import journal
from runner.records.cells import Cell, load_cell, make_cells
from runner.records.fingerprint import (
    contents_of,
    earlier_fingerprint,
    fingerprint,
    science,
)
from runner.records.trained_model import load_model
from tests.command_server import ROOT, run

FIXTURE = Path(__file__).parents[1] / "fixtures/runs_2026_11"
MADE: dict[str, Any] = json.loads((FIXTURE / "cells.json").read_text())
CELLS: list[dict[str, Any]] = MADE["cells"]
SWEEPS = sorted(path.name for path in (FIXTURE / "root/sweeps").iterdir())
# Cases whose numbers have changed since: they are read as before, and the same overrides make a new
# cell.
RENUMBERED = {
    "engram": {"model.parts.n.numerics"},
    "fp8_delayed": {"precision.numerics"},
    "hybrid": {"model.parts.n.numerics"},
    "nvfp4": {"precision.numerics"},
    "nvfp4 micro_batch=2": {"precision.numerics", "train.samples_per_forward"},
}
PLACE = "{here}"  # where the folder lies, in its files and in cells.json


def _cases(rows: Iterable[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", [pytest.param(row, id=row["case"]) for row in rows])


def _of(*cases: str) -> list[dict[str, Any]]:
    return [row for row in CELLS if row["case"] in cases]


def lay_out(here: Path) -> Path:
    """Copy the fixture to `here`, as a disk would hold it now; return its root."""
    shutil.copytree(FIXTURE, here)
    for file in here.rglob("*"):
        if file.suffix in (".json", ".jsonl", ".txt") and PLACE in (text := file.read_text()):
            file.write_text(text.replace(PLACE, str(here)))
        if file.name in ("heartbeat", "lease.json"):
            os.utime(file, (0, 0))  # git keeps no times: the holders are long gone
    return here / "root"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of the old runs, which is only read."""
    return lay_out(tmp_path_factory.mktemp("old") / "runs_2026_11")


@pytest.fixture
def own_root(tmp_path: Path) -> Path:
    """The root of a copy of one's own."""
    return lay_out(tmp_path / "runs_2026_11")


def _overrides(asked: list[str], root: Path) -> list[str]:
    return [override.replace(PLACE, str(root.parent)) for override in asked]


def _asked_again(row: dict[str, Any], root: Path) -> Cell:
    """Return the cell that today's code makes of what was asked."""
    if "eval" in row:
        asked = row["eval"]
        overrides = _overrides(asked["overrides"], root)
        ((cell,), _, _) = evaluation_cells(
            root, asked["target"], overrides, average=asked["average"]
        )
        return cell
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        node = to_plain(compose("config", open_keys(_overrides(row["overrides"], root))))
    (cell,) = make_cells([("", node)])
    return cell


def _run(overrides: list[str], root: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return run("runner", *flags, *_overrides(overrides, root))


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """Return the sha256 of names, types, shapes and bits, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        kind = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name} {kind} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _last_losses(folder: Path) -> dict[str, float]:
    last: dict[str, float] = {}
    for line in read_lines(folder / "metrics.jsonl"):
        last |= {k: line[k] for k in ("loss", "val_loss", "val_loss_average") if k in line}
    return last


def _computes_the_same_bits() -> bool:
    """True on the processor, and with the torch, that trained the fixture."""
    return _machine() == MADE["machine"]


def _machine() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    lines = re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE)
    return {
        "cpu": " ".join(dict(lines).values()),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


@_cases(CELLS)
def test_the_same_overrides_name_the_same_cell(row: dict[str, Any], root: Path) -> None:
    cell = _asked_again(row, root)
    if row["case"] in RENUMBERED:
        assert cell.state == "new"
        return
    if row.get("couples"):  # samples of a forward pass did not count then
        assert cell.state == "new"
        assert earlier_fingerprint(cell.science) == row["fingerprint"]
        return
    assert cell.fingerprint == row["fingerprint"]
    assert cell.state == row["state"]


@_cases(CELLS)
def test_a_frozen_cell_is_read_and_hashed_as_it_was(row: dict[str, Any], root: Path) -> None:
    cell = load_cell(root / "runs" / row["fingerprint"])
    assert cell.state == row["state"]
    assert cell.config.root == str(root)
    keys = science(cell.config, contents_of(cell.config))
    more = {k: v for k, v in keys.items() if cell.science.get(k) != v}
    if row["case"] in RENUMBERED:
        assert set(more) == RENUMBERED[row["case"]]
        old = {key: cell.science.get(key, value) for key, value in keys.items()}
        new = more.keys() - cell.science.keys()  # samples of a forward pass did not count then
        assert fingerprint({k: v for k, v in old.items() if k not in new}) == row["fingerprint"]
        return
    assert bool(more) is ("couples" in row)
    assert (earlier_fingerprint(keys) if more else fingerprint(keys)) == cell.fingerprint
    assert cell.fingerprint == row["fingerprint"]


@_cases(row for row in CELLS if "weights" in row)
def test_the_newest_weights_are_found_and_fit_the_model(row: dict[str, Any], root: Path) -> None:
    model, _, _ = load_model(root / "runs" / row["fingerprint"])
    assert _digest(model.state_dict()) == row["weights"]


@pytest.mark.parametrize("name", SWEEPS)
def test_every_cell_of_an_old_sweep_is_shown(name: str, root: Path, tmp_path: Path) -> None:
    members = read_lines(root / "sweeps" / name / "cells.jsonl")
    known = {row["fingerprint"]: row for row in CELLS}
    page = tmp_path / "report.html"
    status = _cli("status", name, "--root", str(root))
    _cli("report", name, "--root", str(root), "--out", str(page))
    assert len(members) == page.read_text().count('data-label="cell"')
    assert f"{len(members)} cells" in _cli("ls", "--root", str(root))
    table = from_folders(root, name).table.set_index("fingerprint")
    for member in members:
        row = known[member["fingerprint"]]
        assert re.search(rf"{row['fingerprint'][:6]} +{row['state']}", status), status
        assert row["fingerprint"][:6] in page.read_text()
        assert f"{row['fingerprint']} {row['state']}" in _cli(
            "show", row["fingerprint"], "--root", str(root)
        )
        assert table["state"][row["fingerprint"]] == row["state"]
        for key in ("val_loss", "val_loss_average"):
            if key in row.get("losses", {}) and row["state"] == "finished":
                assert table[key][row["fingerprint"]] == row["losses"][key]


def _cli(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output + str(done.exception)
    return done.output


@_cases(row for row in CELLS if "uninterrupted" in row)
def test_an_old_interrupted_run_ends_at_the_bits_of_an_uninterrupted_one(
    row: dict[str, Any], own_root: Path
) -> None:
    """On another processor or torch the order of sums differs, so losses agree to 1e-3 only."""
    folder, whole = own_root / "runs" / row["fingerprint"], row["uninterrupted"]
    before = len(journal.attempts(folder))
    done = _run(row["overrides"], own_root)
    assert done.returncode == 0, done.stderr
    assert journal.state(folder) == "finished"
    assert len(journal.attempts(folder)) == before + 1
    first = min(
        line["restored"] for line in read_lines(folder / "metrics.jsonl") if "restored" in line
    )
    assert first == row["checkpoint"]
    losses = _last_losses(folder)
    assert losses == pytest.approx(whole["losses"], rel=1e-3)
    if _computes_the_same_bits():
        model, _, _ = load_model(folder)
        assert _digest(model.state_dict()) == whole["weights"]
        assert losses == whole["losses"]


@_cases(_of("plain", "steps=0 on other data", "diverged"))
def test_an_old_finished_run_has_nothing_left_to_do(row: dict[str, Any], own_root: Path) -> None:
    metrics = own_root / "runs" / row["fingerprint"] / "metrics.jsonl"
    before = metrics.read_bytes()
    done = _run(row["overrides"], own_root)
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stderr
    assert metrics.read_bytes() == before


@pytest.mark.parametrize("name", MADE["sweeps"])
def test_an_old_sweep_given_again_is_finished(name: str, own_root: Path) -> None:
    count = len(read_lines(own_root / "sweeps" / name / "cells.jsonl"))
    done = _run(MADE["sweeps"][name], own_root, "-m")
    assert done.returncode == 0, done.stderr
    assert f"{count} cells ({count} finished); 0 to run" in done.stderr
