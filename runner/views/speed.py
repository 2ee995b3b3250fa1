"""How fast the finished runs under a root went, from which the plan takes the time of others.

A run's speed leaves out the first steps of each attempt, which load, compile and warm up: a run of
a few steps says nothing. Runs count by the time that they took, and those nearest in size to the
run planned are asked: a small model fills a machine less.
"""

import json
import math
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from runner.machine import environment
from runner.machine.errors import DataError
from runner.machine.hardware import gpu_named
from runner.records import journal, metrics
from runner.records.cells import read_cell

Key = tuple[str, str]  # (the JSON of a precision's keys, hardware)

_FIRST_STEPS = 10  # of an attempt
_NEAR = 2.0  # factor in FLOPs a step within which runs are as near as the nearest


@dataclass(frozen=True)
class Speed:
    """The work of a finished run after its first steps: `flops` in `seconds`."""

    flops_per_step: float
    flops: float
    seconds: float


def speeds(root: Path, keys: Collection[Key]) -> dict[Key, list[Speed]]:
    """Return the speeds of the finished runs under `root` that have one of `keys`."""
    known: dict[Key, list[Speed]] = {}
    for folder in root.glob("runs/*"):
        with suppress(DataError):  # a damaged run tells nothing
            key = _key(folder)
            if key is not None and key in keys and journal.state(folder) == "finished":
                speed = speed_of(metrics.read(folder))
                if speed is not None:
                    known.setdefault(key, []).append(speed)
    return known


def _key(folder: Path) -> Key | None:
    """Return the precision and hardware of a run, None if it has not noted them."""
    record = environment.first_record(folder)
    named = [*record.get("gpus", []), record.get("cpu")]
    if named[0] is None:
        return None
    return precision_key(read_cell(folder)["science"]), hardware_key(named[0])


def speed_of(rows: Sequence[metrics.Line]) -> Speed | None:
    """Return the speed that the valid `rows` of a run tell, None if it was too short."""
    attempt, begun, last = None, 0, (0, 0.0)
    flops = seconds = 0.0
    per_step = 0.0
    for row in rows:
        if "flops_per_s" not in row:
            continue
        if row.get("attempt") != attempt:
            attempt, begun = row.get("attempt"), last[0]
        done = row["flops"] - last[1]
        if last[0] - begun >= _FIRST_STEPS:
            flops += done
            seconds += done / row["flops_per_s"]
        last = (row["step"], row["flops"])
        per_step = row["flops"] / max(1, row["step"])
    return Speed(per_step, flops, seconds) if seconds > 0 else None


def tokens_per_s(rows: Sequence[metrics.Line]) -> float | None:
    """Return the median of a run's tokens/s, without the first steps of each attempt if it can."""
    attempt, begun, last = None, 0, 0
    first: list[float] = []
    later: list[float] = []
    for row in rows:
        if "tokens_per_s" not in row:
            continue
        if row.get("attempt") != attempt:
            attempt, begun = row.get("attempt"), last
        (later if last - begun >= _FIRST_STEPS else first).append(row["tokens_per_s"])
        last = row["step"]
    return median(later or first) if later or first else None


def expected_flops_per_s(known: Sequence[Speed], flops_per_step: float) -> float | None:
    """Return the FLOP/s of the runs of `known` nearest in size, None if there is none."""
    if not known or flops_per_step <= 0:
        return None
    away = [abs(math.log(speed.flops_per_step / flops_per_step)) for speed in known]
    reach = min(away) + math.log(_NEAR)
    near = [speed for speed, distance in zip(known, away, strict=True) if distance <= reach]
    return sum(speed.flops for speed in near) / sum(speed.seconds for speed in near)


def hardware_key(name: str | None) -> str:
    """Return a key equal for equal hardware: the table's entry of a GPU, else the name itself."""
    if name is None:
        return environment.cpu_name()
    gpu = gpu_named(name)
    return name if gpu is None else repr(gpu)


def precision_key(science: dict[str, Any]) -> str:
    """Return a key equal for equal precision."""
    return json.dumps(
        {k: v for k, v in science.items() if k.startswith("precision.")}, sort_keys=True
    )
