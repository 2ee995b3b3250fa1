"""The cluster of the tests, and commands that end with their test."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import command_server
from tests.command_server import ROOT, Command
from tests.slurm import cluster
from tests.slurm.sweeps import MISSING, Line, Start, sweep_line


@pytest.fixture(scope="module", autouse=True)
def slurm() -> Iterator[None]:
    """The cluster, up; left up where it was."""
    if MISSING:
        yield
        return
    with open(f"{cluster.HOME}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a machine has one: test runs take turns
        was_up = cluster.is_up()
        cluster.up()
        os.environ["SLURM_CONF"] = str(cluster.HOME / "slurm.conf")
        # Jobs find tests.faults, which is no part of a snapshot.
        os.environ["PYTHONPATH"] = str(ROOT)
        yield
        if not was_up:
            cluster.down()


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a command that ends with the test at the latest."""
    begun: list[Command] = []

    def inner(line: list[str]) -> Command:
        begun.append(command_server.start(*line, keep=True))
        return begun[-1]

    yield inner
    for process in begun:
        process.kill()


@pytest.fixture
def command(tmp_path: Path, text: Path) -> Line:
    """The command of a sweep on SLURM: module and arguments."""

    def inner(*arguments: str, launcher: str = "slurm", root: Path = tmp_path) -> list[str]:
        return sweep_line(text, root, *arguments, launcher=launcher)

    return inner
