"""The inputs of a run, taken from other runs: a model to start from, output files, a set of runs.

A run waits until a single input has finished, and until each of a set has finished or diverged; it
does not wait for a `live` one. The fingerprints of its inputs enter its own. An output file may not
exist yet when the fingerprint is made, so the consumer records the sha256 that it reads; a file
that changes later is drift.
"""

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict

from models.config import config, execution
from runner.machine.errors import ConfigError, DataError
from runner.machine.text_files import read_json
from runner.machine.typed_json import checked
from runner.records import journal

# Of a path: input:NAME is the only output file of input NAME, input:NAME/FILE one of several.
PREFIX = "input:"


@config
class InputConfig:
    """One named input.

    Args:
        runs: fingerprints; exactly one unless `all`.
        take: of a model, its weights, its averaged weights, or everything: with optimiser and
            step, so that training continues (a longer run, a cool-down from a trunk).
        all: whether the input is a set of runs.
        live: read the run's checkpoints while it still trains.
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
        """The fingerprint of a single input."""
        return self.runs[0]

    def pending(self, folder: Path) -> list[str]:
        """Return the fingerprints that this input still waits for; `folder` is runs/."""
        ended = ("finished", "diverged") if self.all else ("finished",)
        return [] if self.live else [r for r in self.runs if journal.state(folder / r) not in ended]


def check_reference(path: str, text: str, inputs: Mapping[str, InputConfig]) -> None:
    """Check that `text`, the value of the key `path`, names one run of `inputs`.

    Raises:
        ConfigError: it names another, or a set of runs; the message lists the inputs.
    """
    name = split_reference(text)[0]
    if name not in inputs:
        raise ConfigError(
            f"{path}={text}: no input {name!r}; there are: {', '.join(inputs) or 'none'}"
        )
    if len(inputs[name].runs) > 1:
        raise ConfigError(
            f"{path}={text}: input {name} has {len(inputs[name].runs)} runs; a file is read of one"
        )


def named_input(inputs: Mapping[str, InputConfig], name: str, reader: str) -> InputConfig:
    """Return the input `name`, that `reader` reads.

    Raises:
        ConfigError: there is none of that name; the message lists the inputs.
    """
    if name not in inputs:
        raise ConfigError(
            f"{reader} is the input {name!r}, and the run has: {', '.join(inputs) or 'none'}; set "
            f"inputs.{name}.runs=[FINGERPRINT]"
        )
    return inputs[name]


def split_reference(text: str) -> tuple[str, str]:
    """Return (NAME, FILE) of `input:NAME/FILE`; FILE is "" where `text` names none."""
    name, _, output = text.removeprefix(PREFIX).partition("/")
    return name, output


def output_file(reference: str, inputs: Mapping[str, tuple[Path, ...]]) -> Path:
    """Return the file in the input's outputs/ that `input:NAME` or `input:NAME/FILE` names.

    Raises:
        DataError: the run has no such output, or several for NAME alone; they are listed.
    """
    name, output = split_reference(reference)
    (run,) = inputs[name]
    outputs = sorted(f for f in (run / "outputs").glob("*") if not f.name.startswith("."))
    matches = [file for file in outputs if output in ("", file.name)]
    if len(matches) != 1:
        names = ", ".join(file.name for file in outputs) or "none"
        raise DataError(
            f"{reference}: run {run.name} has the outputs: {names}; name one as {PREFIX}{name}/FILE"
        )
    return matches[0]


def sha256(file: Path) -> str:
    """Return the hash of what a file holds."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class _Read(TypedDict):
    run: str
    output: str
    sha256: str


def read_files(run: Path) -> dict[tuple[str, str], str]:
    """Return the sha256 of each file that `run` has read from its inputs, by (run, output)."""
    digests: dict[tuple[str, str], str] = {}
    for attempt in journal.attempts(run):
        for event in journal.events(attempt):
            if event["event"] == "read":
                read = checked(event, _Read, f"{attempt / 'events.jsonl'}: a read")
                digests[read["run"], read["output"]] = read["sha256"]
    return digests


def changed_inputs(run: Path) -> list[str]:
    """Return a line for each file that `run` has read from an input and that changed or is gone."""
    changes = []
    for (source, output), digest in read_files(run).items():
        file = run.parent / source / "outputs" / output
        now = _sha256_of(file, file.stat().st_mtime_ns) if file.exists() else "gone"
        if now != digest:
            changes.append(f"{source}/{output} was {digest[:8]}, is {now[:8]}")
    return changes


@lru_cache
def _sha256_of(file: Path, _changed_ns: int) -> str:
    return sha256(file)  # cached: many runs may have read the same file


def read_numbers(file: Path) -> list[float]:
    """Return the list of numbers in a JSON file.

    Raises:
        DataError: the file holds anything else.
    """
    try:
        return [float(value) for value in read_json(file)]
    except (ValueError, TypeError) as error:
        raise DataError(f"{file} must hold a JSON list of numbers ({error})") from error
