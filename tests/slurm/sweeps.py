"""Commands of sweeps on the cluster of the tests, and what they wait for."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_server import Command
from tests.conftest import TINY
from tests.slurm import cluster

Line = Callable[..., list[str]]
Start = Callable[[list[str]], Command]
# Long by sleeping: a node of the test cluster has a fraction of a core.
SLOW = [
    "model._target_=tests.faults.FaultyConfig",
    "model.fault=slow",
    "train.steps=200",
    "eval.every=100",
    "eval.tokens=32",
]
MISSING = cluster.missing()
needs_slurm = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: make slurm-up")


def sweep_line(text: Path, root: Path, *arguments: str, launcher: str = "slurm") -> list[str]:
    """Return the command of a sweep: module and arguments."""
    base = ["runner", "-m", *TINY, f"data.sources.0.path={text}"]
    return [*base, f"root={root}", f"hydra/launcher={launcher}", *arguments]
