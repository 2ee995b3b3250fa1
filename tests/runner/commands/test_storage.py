"""show, ls, du, gc, pack, unpack, adopt: what they print, move and delete."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.records import journal
from runner.records.cells import find_cell
from tests.command_server import run
from tests.conftest import TINY

Run = Callable[..., subprocess.CompletedProcess[str]]


def _cli(*arguments: str, code: int = 0) -> str:
    done = run("runner.commands.cli", *arguments)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def sweep(espalier: Run, tmp_path: Path) -> list[Path]:
    """Two finished cells of a sweep `s`."""
    assert espalier("-m", "seed=1,2", "name=s", "train.checkpoint.every_steps=4").returncode == 0
    return sorted(tmp_path.glob("runs/*"))


def test_show_and_ls_tell_what_is_known(sweep: list[Path], tmp_path: Path) -> None:
    shown = _cli("show", sweep[0].name[:8], "--root", str(tmp_path))
    for part in (
        "finished",
        "attempt 1 on",
        "checkpointed step=12",
        "val_loss=",
        "model.width: 24",
    ):
        assert part in shown
    for key in ("train.log_every: 1", "optim.betas"):
        assert (key in shown) is (key == "train.log_every: 1")
        assert key in _cli("show", sweep[0].name[:8], "--all", "--root", str(tmp_path))
    assert _cli("ls", "--root", str(tmp_path)).startswith("s: 2 cells (2 finished), 20")


def test_a_packed_sweep_is_whole_on_another_machine(
    sweep: list[Path], espalier: Run, tmp_path: Path
) -> None:
    file, other = tmp_path / "s.tar", tmp_path / "other"
    assert "MB" in _cli("pack", "s", "--root", str(tmp_path), "--out", str(file))
    assert "exists" in _cli("pack", "s", "--root", str(tmp_path), "--out", str(file), code=1)
    assert "2 cells added, 0 left" in _cli("unpack", str(file), "--root", str(other))
    assert "0 cells added, 2 left" in _cli("unpack", str(file), "--root", str(other))
    assert sorted(f.name for f in other.glob("runs/*")) == [f.name for f in sweep]
    again = espalier("-m", "seed=1,2", "name=s", f"root={other}")
    assert again.returncode == 0
    assert "2 cells (2 finished); 0 to run" in again.stderr
    bad = tmp_path / "bad.tar"
    subprocess.run(["tar", "-cf", str(bad), "-C", str(tmp_path), "text.txt"], check=True)
    assert "no archive of `espalier pack`" in _cli("unpack", str(bad), "--root", str(other), code=1)


def test_gc_shows_first_and_deletes_only_what_nobody_needs(
    sweep: list[Path], espalier: Run, tmp_path: Path
) -> None:
    assert espalier("-m", "seed=3", "name=gone").returncode == 0
    (tmp_path / "sweeps/gone/cells.jsonl").unlink()
    (sweep[0] / ".cell.json-abc").write_text("half")
    shown = _cli("gc", "--root", str(tmp_path), "--checkpoints")
    assert "a run of no sweep (finished)" in shown
    assert "half written" in shown
    assert "an earlier checkpoint of an ended run" in shown
    assert "could go: --delete" in shown
    assert len(list(tmp_path.glob("runs/*"))) == 3
    _cli("gc", "--root", str(tmp_path), "--checkpoints", "--delete")
    assert sorted(tmp_path.glob("runs/*")) == sweep
    assert [len(list(f.glob("checkpoints/*"))) for f in sweep] == [1, 1]
    assert "0.0 MB could go" in _cli("gc", "--root", str(tmp_path))
    assert "s: 0." in _cli("du", "--root", str(tmp_path))
    (tmp_path / "no/runs").parent.mkdir()
    (tmp_path / "no/runs").touch()
    for root in ("no", "no/runs"):
        assert "runs is not a folder" in _cli("gc", "--root", str(tmp_path / root), code=1)


def test_a_renamed_run_is_adopted_with_its_reason(
    espalier: Run, tmp_path: Path, text: Path
) -> None:
    assert espalier("-m", "seed=7", "name=x").returncode == 0
    (old,) = tmp_path.glob("runs/*")
    folder = tmp_path / "renamed"
    folder.mkdir()
    (folder / "sweep.yaml").write_text(
        "# @package _global_\ndefaults: [/config, _self_]\nname: renamed\n"
        "hydra: {mode: MULTIRUN, sweeper: {params: {seed: '7,8'}}}\n"
    )
    overrides = [*TINY, f"data.sources.0.path={text}", f"root={tmp_path}", "train.clip=2.0"]
    _cli("adopt", old.name[:8], str(folder), "--reason", "", *overrides, code=1)
    told = _cli("adopt", old.name[:8], str(folder), "--reason", "clip's name was wrong", *overrides)
    assert "is now finished" in " ".join(told.split())
    (new,) = (f for f in tmp_path.glob("runs/*") if f != old)
    note = json.loads((new / "adopted.json").read_text())
    assert (note["from"], note["reason"]) == (old.name, "clip's name was wrong")
    assert note["difference"] == {"train.clip": [1.0, 2.0]}
    assert journal.state(new) == "finished"
    assert find_cell(tmp_path, new.name).config.train.clip == 2.0
    assert "adopted from" in _cli("show", new.name, "--root", str(tmp_path))


def test_inspect_prints_each_weight_under_each_format(sweep: list[Path], tmp_path: Path) -> None:
    shown = _cli("precision", "inspect", sweep[0].name, "--root", str(tmp_path))
    rows = {line.split()[0]: line.split() for line in shown.splitlines()[1:] if line}
    assert set(rows) == {
        f"layers.{i}.{part}"
        for i in (0, 1)
        for part in ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
    }
    for name, row in rows.items():
        one, _, four_over_six, mxfp4, mxfp8, _ = map(float, row[-6:])
        assert mxfp8 > 28, name
        assert 17 < one < 23, name
        assert four_over_six > one, name
        assert mxfp4 < one, name
