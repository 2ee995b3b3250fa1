"""Commands that run no cell answer at once: they import no torch and start no worker."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.records import journal
from runner.records.cells import Cell, freeze_cell, join_sweep, make_cells
from tests.conftest import ROOT, TINY

Compose = Callable[..., dict[str, Any]]
HEAVY = (
    "torch",
    "transformers",
    "mlflow",
    "datasets",
    "pandas",
    "numpy",
    "scipy",
    "matplotlib",
    "submitit",
    "optuna",
    "tokenizers",
    "lm_eval",
    "runner.launch.pool",
    "runner.launch.slurm",
)
COUNT = """
import json, runpy, sys
from hydra._internal.config_loader_impl import ConfigLoaderImpl
module, heavy = sys.argv[1], json.loads(sys.argv[2])
sys.argv = [module, *sys.argv[3:]]
composed, compose = [], ConfigLoaderImpl.load_configuration
ConfigLoaderImpl.load_configuration = lambda *a, **k: (composed.append(k), compose(*a, **k))[1]
try:
    runpy.run_module(module, run_name="__main__")
except SystemExit as ended:
    if isinstance(ended.code, str):
        print(ended.code, file=sys.stderr)
server = sys.modules.get("multiprocessing.forkserver")
started = server is not None and server._forkserver._forkserver_pid is not None
imported = [name for name in heavy if name in sys.modules]
print(json.dumps([imported, started, len(composed)]), file=sys.stderr)
"""


def _answer(module: str, *arguments: str) -> str:
    """Return what a command says, having checked what it needed for that."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT, module, json.dumps(HEAVY), *arguments],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    said, _, counted = done.stderr.rstrip().rpartition("\n")
    imported, started, composed = json.loads(counted)
    assert not imported, f"{arguments} imports {imported}"
    assert not started, f"{arguments} starts the template of the workers"
    assert composed <= 1 or "-m" not in arguments, f"{arguments} composes {composed} times"
    return said + done.stdout


INTERRUPT = """
import os, runpy, signal, sys
class CtrlC:
    def find_spec(self, name, *_):
        if name == imported:
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
sys.meta_path.insert(0, CtrlC())
sys.argv, imported = ["runner", "-m", "train.steps=1", "seed=1,2"], sys.argv[1]
runpy.run_module("runner", run_name="__main__")
"""


@pytest.mark.parametrize(
    "imported", ["omegaconf", "runner.launch.launch"], ids=["importing", "composed"]
)
def test_ctrl_c_before_a_run_ends_it_in_one_line(imported: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPT, imported],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def finished(tmp_path: Path, compose: Compose) -> Cell:
    """A cell that has ended, as its records have it."""
    (cell,) = make_cells([("", compose())])
    freeze_cell(cell)
    join_sweep(cell.config.name, [cell])
    attempt = journal.claim(cell.folder)
    assert attempt is not None
    writer = journal.Journal(cell.folder, attempt)
    writer.event("finished")
    writer.close()
    assert cell.state == "finished"
    return cell


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("mdoel=x", "mdoel"),
        ("model.widht=64", "did you mean width?"),
        ("model.width=wide", "model.width='wide'"),
        ("optim.lr=-1", "must be positive"),
    ],
)
@pytest.mark.parametrize("flags", [["-m"], []], ids=["sweep", "cell"])
def test_a_mistake_is_refused_at_once(override: str, says: str, flags: list[str]) -> None:
    assert says in _answer("runner", *flags, override)


@pytest.mark.parametrize(
    ("flags", "says"), [(["-m"], "1 cells (1 finished); 0 to run"), ([], "nothing to do")]
)
def test_what_is_done_is_not_prepared(
    finished: Cell, text: Path, tmp_path: Path, flags: list[str], says: str
) -> None:
    same = [*TINY, f"data.sources.0.path={text}", f"root={tmp_path}"]
    assert says in _answer("runner", *flags, *same)


@pytest.mark.parametrize(
    "verb",
    [
        ["-h"],
        ["--version"],
        ["keys", "optim"],
        ["ls"],
        ["status", "default"],
        ["failures", "default"],
    ],
    ids=" ".join,
)
def test_what_is_shown_needs_the_records_only(
    finished: Cell, tmp_path: Path, verb: list[str]
) -> None:
    root = [] if verb[0] in ("-h", "--version", "keys") else ["--root", str(tmp_path)]
    assert _answer("runner.commands.cli", *verb, *root)
