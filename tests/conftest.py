"""Shared: a small text, a way to compose and train a tiny cell in a folder of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
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

    from runner.commands.hydra_plugin import open_keys, register, to_plain

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
    """Run `python -m runner` on the tiny cell with more overrides."""

    def inner(*arguments: str) -> subprocess.CompletedProcess[str]:
        flags = [a for a in arguments if a.startswith("-")]
        overrides = [a for a in arguments if not a.startswith("-")]
        command = [sys.executable, "-m", "runner", *flags, *TINY, f"data.sources.0.path={text}"]
        return subprocess.run(
            [*command, f"root={tmp_path}", *overrides],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )

    return inner
