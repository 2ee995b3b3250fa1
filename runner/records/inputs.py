"""What a run takes from other runs: a model to start from, files that they made, all runs of a stage.

A run waits for a single input until it is finished, for a set until each of it has finished or diverged;
a `live` input is followed while it runs. The fingerprints of the runs enter the fingerprint of the one
that takes them; the content of a file does not exist yet when that is made: the consumer notes the sha256
it has read, and another one is drift.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

from models.config import config, execution
from runner.machine.errors import ConfigError, DataError
from runner.records import journal

PREFIX = "input:"  # of a path: input:NAME is the only output of input NAME, input:NAME/FILE one of several


@config
class InputConfig:
    """One named input.

    Args:
        runs: their fingerprints; a single one where not `all`.
        take: of a model: its weights, its averaged weights, or everything: optimiser and step too, so that
            training goes on where it ended (a longer run, a cool-down from a trunk).
        all: a set of runs, however many.
        live: follow the run while it still trains.
    """

    runs: tuple[str, ...]
    take: Literal["weights", "average", "everything"] = "weights"
    all: bool = False
    live: bool = execution(False)

    def __post_init__(self) -> None:
        if not self.runs or (len(self.runs) > 1 and not self.all):
            raise ValueError(f"runs={list(self.runs)} must be one run, or several with all=true")
        object.__setattr__(self, "runs", tuple(sorted(self.runs)))

    @property
    def run(self) -> str:
        """The run of a single input."""
        return self.runs[0]

    def pending(self, folder: Path) -> list[str]:
        """Return the runs in `folder` (runs/) that this input still waits for."""
        ended = ("finished", "diverged") if self.all else ("finished",)
        return [] if self.live else [r for r in self.runs if journal.state(folder / r) not in ended]


def check_references(path: str, text: str, inputs: Mapping[str, InputConfig]) -> None:
    """Refuse `text`, the value of key `path`, where it names an input that is not there.

    Raises:
        ConfigError: naming the inputs that there are.
    """
    name = text.removeprefix(PREFIX).partition("/")[0]
    if text.startswith(PREFIX) and name not in inputs:
        raise ConfigError(
            f"{path}={text}: no input {name!r}; there are: {', '.join(inputs) or 'none'}"
        )


def output_file(reference: str, inputs: Mapping[str, tuple[Path, ...]]) -> Path:
    """Return the file that `input:NAME` or `input:NAME/FILE` names, among `outputs/` of the run.

    Raises:
        DataError: the run has no such output; those that it has are named.
    """
    name, _, output = reference.removeprefix(PREFIX).partition("/")
    (run,) = inputs[name]
    found = sorted(f for f in (run / "outputs").glob("*") if not f.name.startswith("."))
    chosen = [file for file in found if output in ("", file.name)]
    if len(chosen) != 1:
        there = ", ".join(file.name for file in found) or "none"
        raise DataError(
            f"{reference}: run {run.name} has the outputs: {there}; name one as {PREFIX}{name}/FILE"
        )
    return chosen[0]


def sha256(file: Path) -> str:
    """Return the hash of what a file holds."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_files(run: Path) -> dict[tuple[str, str], str]:
    """Return the sha256 of each file that `run` has read from its inputs, by (run, output)."""
    found: dict[tuple[str, str], str] = {}
    for attempt in journal.attempts(run):
        for event in journal.events(attempt):
            if event["event"] == "read":
                found[event["run"], event["output"]] = event["sha256"]
    return found


def changed_inputs(run: Path) -> list[str]:
    """Return which files that `run` has read from its inputs are other files, or gone, by now: drift."""
    found = []
    for (source, output), digest in read_files(run).items():
        file = run.parent / source / "outputs" / output
        now = _sha256_of(file, file.stat().st_mtime_ns) if file.exists() else "gone"
        if now != digest:
            found.append(f"{source}/{output} was {digest[:8]}, is {now[:8]}")
    return found


@lru_cache
def _sha256_of(file: Path, _changed_ns: int) -> str:
    return sha256(file)  # once for all that have read it


def read_numbers(file: Path) -> list[float]:
    """Return the list of numbers that a JSON file holds.

    Raises:
        DataError: it holds something else.
    """
    try:
        return [float(value) for value in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise DataError(f"{file} must hold a JSON list of numbers ({error})") from error
