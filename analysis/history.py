"""Metric histories: the table, the reader of a run folder's file, and the cache of histories.

A history has columns fingerprint, step, key, value; the first and the third are categories in
lexical order, so that millions of points stay small.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.json as pj
import pyarrow.parquet as pq

from analysis.records import no_numbers, parse_lines

COLUMNS = ["fingerprint", "step", "key", "value"]
_NOT_METRICS = {"step", "time", "attempt", "restored"}
_VERSION = "2"  # of the reading rules; histories cached under another one are read again
Part = tuple[str, str, Any, Any]  # run, key, steps, values


def assemble(parts: Iterable[Part]) -> pd.DataFrame:
    """Return the history made of `parts`, each one metric of one run, in their order."""
    parts = [part for part in parts if len(part[2])]
    lengths = [len(part[2]) for part in parts]
    steps = (
        np.concatenate([np.asarray(p[2], dtype=np.int64) for p in parts])
        if parts
        else np.empty(0, np.int64)
    )
    values = (
        np.concatenate([np.asarray(p[3], dtype=np.float64) for p in parts])
        if parts
        else np.empty(0)
    )
    columns = {
        "fingerprint": _categories([part[0] for part in parts], lengths),
        "step": steps,
        "key": _categories([part[1] for part in parts], lengths),
        "value": values,
    }
    return pd.DataFrame(columns)


def _categories(names: list[str], lengths: list[int]) -> pd.Categorical:
    known = sorted(set(names))
    code = {name: index for index, name in enumerate(known)}
    codes = np.repeat(np.array([code[name] for name in names], dtype=np.int32), lengths)
    return pd.Categorical.from_codes(codes, pd.Index(known, dtype="str"))


def read_folder(file: Path, run: str) -> list[Part]:
    """Return the parts of one metrics.jsonl by the rules of docs/run-folder.md.

    Raises:
        ValueError: a line is damaged; file and line are named.
    """
    if not file.exists():
        return []
    content = file.read_bytes().rpartition(b"\n")[0]
    return _plain(content, run) or _by_rules(parse_lines(file, content, _problem), run)


def _plain(content: bytes, run: str) -> list[Part]:
    """Return the parts of a file of one attempt, in bulk; [] where the rules are needed."""
    lines = content.count(b"\n") + 1
    if not content.startswith(b"{") or content.count(b"\n{") + 1 != lines:
        return []  # Arrow reads a line that is `null` out of bounds
    if b'"restored"' in content or content.count(b"}\n") + 1 != lines:
        return []
    try:
        table = pj.read_json(
            pa.BufferReader(content), pj.ReadOptions(use_threads=False, block_size=1 << 24)
        )
    except pa.ArrowInvalid:  # NaN and Infinity are Python's JSON only
        return []
    if "step" not in table.column_names or not pa.types.is_integer(table["step"].type):
        return []
    if table["step"].null_count or table.num_rows != lines:
        return []
    if "attempt" in table.column_names and len(table["attempt"].unique()) > 1:
        return []
    steps = table["step"].to_numpy()
    parts: list[Part] = []
    for name in table.column_names:
        if name in _NOT_METRICS:
            continue
        values = table[name]
        if not (pa.types.is_floating(values.type) or pa.types.is_integer(values.type)):
            return []
        present = values.is_valid().to_numpy()
        own = steps[present]
        if np.any(np.diff(own) <= 0):
            return []
        parts.append((run, name, own, values.drop_null().to_numpy()))
    return parts


def _problem(line: Any) -> str | None:
    """Return what is wrong with a line of metrics, None if nothing is."""
    problem = no_numbers(line)
    if problem is None and not isinstance(line.get("restored", line.get("step")), int):
        return "has no whole number as `step` or `restored`"
    return problem


def _by_rules(lines: Iterable[dict[str, Any]], run: str) -> list[Part]:
    """Return the parts line by line, by the rules of docs/run-folder.md.

    A line after one of a later attempt is void; `restored` voids later steps.
    """
    points: dict[tuple[int, str], float] = {}
    newest = 0
    for line in lines:
        attempt = line.get("attempt", newest)
        if attempt < newest:
            continue
        newest = attempt
        if "restored" in line:
            points = {k: v for k, v in points.items() if k[0] <= line["restored"]}
            continue
        for name, value in line.items():
            if name not in _NOT_METRICS:
                points.pop(
                    (line["step"], name), None
                )  # a later point moves to where it was written
                points[line["step"], name] = float(value)
    metrics: dict[str, tuple[list[int], list[float]]] = {}
    for (step, name), value in points.items():
        steps, values = metrics.setdefault(name, ([], []))
        steps.append(step)
        values.append(value)
    return [(run, name, steps, values) for name, (steps, values) in metrics.items()]


def last_values(history: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each run with the last value of each of its metrics."""
    if history.empty:
        return pd.DataFrame()
    last = history.dropna(subset=["value"]).drop_duplicates(["fingerprint", "key"], keep="last")
    wide = last.pivot(index="fingerprint", columns="key", values="value")
    wide.columns = wide.columns.astype(str)
    wide.index = wide.index.astype(str)
    return wide


def cached(
    file: Path | None, stamps: Mapping[str, str], read: Callable[[list[str]], pd.DataFrame]
) -> pd.DataFrame:
    """Return the history of the runs in `stamps`; only those whose stamp has changed are read.

    Args:
        file: the cache, a parquet file; None, or one that cannot be written: no cache.
        stamps: for each run what changes with its metrics.
        read: returns the history of the runs given.
    """
    stored, stored_stamps = _load(file) if file else (None, {})
    changed = [run for run, stamp in stamps.items() if stored_stamps.get(run) != stamp]
    if stored is None or not stored_stamps:
        history = read(list(stamps))
    elif not changed and len(stored_stamps) == len(stamps):
        return stored
    else:
        outdated = (set(stored_stamps) - set(stamps)) | set(changed)
        unchanged = stored[~stored["fingerprint"].isin(outdated)]
        history = _together(unchanged, read(changed)) if changed else _together(unchanged)
    if file:
        with suppress(OSError):
            _store(file, history, stamps)
    return history


def _together(*parts: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of all parts, their categories in lexical order."""
    for column in ("fingerprint", "key"):
        known = sorted(set().union(*(part[column].unique() for part in parts)))
        parts = tuple(
            part.assign(**{column: part[column].cat.set_categories(known)}) for part in parts
        )
    return (
        pd.concat(parts, ignore_index=True) if len(parts) > 1 else parts[0].reset_index(drop=True)
    )


def _load(file: Path) -> tuple[pd.DataFrame | None, dict[str, str]]:
    try:
        table = pq.read_table(file)
        facts = table.schema.metadata or {}
        if facts.get(b"espalier") != _VERSION.encode():
            return None, {}
        return _together(table.to_pandas()), json.loads(facts[b"stamps"])
    except (OSError, pa.ArrowInvalid, KeyError, ValueError):
        return None, {}


def _store(file: Path, history: pd.DataFrame, stamps: Mapping[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pandas(history, preserve_index=False)
    facts = {b"espalier": _VERSION.encode(), b"stamps": json.dumps(dict(stamps)).encode()}
    part = file.with_name(f"{file.name}.{os.getpid()}")
    pq.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), **facts}), part)
    part.replace(file)
