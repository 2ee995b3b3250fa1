"""Shared: a small text, a way to compose and train a tiny cell in a folder of its own."""

import os
import subprocess
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import shape_checks
from tests.command_server import ROOT, run
from tests.slurm import cluster

shape_checks.install()  # before a test imports our packages
# A library of one quantiser takes ten seconds to compile; tests that want them say so. The kernels
# of a GPU stay.
if not torch.cuda.is_available():
    os.environ.setdefault("ESPALIER_EAGER_KERNELS", "1")

TINY = [
    "data=text",
    "model=gpt_pico",
    "train.sequence_length=16",
    "train.batch_size=4",
    "train.steps=12",
    "train.log_every=1",
    "eval.every=6",
    "eval.tokens=256",
    "eval.sample_tokens=4",
    "track.uri=off",
    "data.split=tail",
    "train.threads=1",  # bits depend on it; and two threads beside another test wait for each other
]


def write_text(file: Path) -> Path:
    """Write a few thousand bytes that a model can learn."""
    file.write_text("".join(f"line {i}: {i * i} is the square of {i}.\n" for i in range(200)))
    return file


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of a few thousand bytes that a model can learn."""
    return write_text(tmp_path / "text.txt")


def compose_tiny(root: Path, text: Path, *overrides: str) -> dict[str, Any]:
    """Return the plain node that Hydra composes from overrides on the tiny cell."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from runner.commands.composer import open_keys, to_plain
    from runner.commands.hydra_plugin import register

    register()
    base = [*TINY, f"data.sources.0.path={text}", f"root={root}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return to_plain(hydra_compose("config", open_keys([*base, *overrides])))


@pytest.fixture
def compose(tmp_path: Path, text: Path) -> Callable[..., dict[str, Any]]:
    """Return what Hydra composes, as `compose_tiny`, in a folder of the test's own."""
    return partial(compose_tiny, tmp_path, text)


@pytest.fixture
def espalier(tmp_path: Path, text: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m runner`, forked, on the tiny cell with more overrides."""

    def inner(*arguments: str) -> subprocess.CompletedProcess[str]:
        flags = [a for a in arguments if a.startswith("-")]
        overrides = [a for a in arguments if not a.startswith("-")]
        base = [*flags, *TINY, f"data.sources.0.path={text}", f"root={tmp_path}"]
        return run("runner", *base, *overrides)

    return inner


def pytest_addoption(parser: pytest.Parser) -> None:
    """Say for how long the server is soaked; `make soak` takes a larger model and 10 minutes."""
    parser.addoption("--soak-seconds", type=float, default=60.0, help="of test_soak.py")


# How the tests share a machine, and what `make test-quick` leaves out.

_MOST_WORKERS = 8
_ONE_WORKER = (  # for the files of a folder together, and for a file
    "tests/runner/launch/slurm/",
    "tests/runner/serve/",
    "tests/runner/views/test_mlflow_server.py",
)
_LEFT_OUT: Counter[str] = Counter()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """A worker to a core, and one that waits for SLURM most of its time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, _MOST_WORKERS) + (not cluster.missing())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal the tests out one by one, but those of one cluster, run or server to one worker.

    xdist's own marks for that (--dist loadgroup) do nothing with pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class OneByOne(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((s for s in _ONE_WORKER if nodeid.startswith(s)), nodeid)

    return OneByOne(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow tests: one that begins last would keep the other workers waiting."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Count what is left out, by file."""
    _LEFT_OUT.update(item.location[0] for item in items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell a worker's count to the process that sums up."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(_LEFT_OUT)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take the count of a worker: each has left out the same."""
    _LEFT_OUT.clear()
    _LEFT_OUT.update(node.workeroutput["left_out"])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what was left out."""
    if _LEFT_OUT:
        files = ", ".join(f"{count} of {file}" for file, count in sorted(_LEFT_OUT.items()))
        terminalreporter.line(f"left out: {files}")
