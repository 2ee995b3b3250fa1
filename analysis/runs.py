"""Runs of a sweep, read from run folders: one tidy table and one of metric histories.

Columns of `table`: fingerprint, label, the name chosen in each group (`model`, `precision`, ...),
state, the science keys (`model.width`, `seed`, ...; lists as JSON), the run's own facts
(`num_parameters`, `flops`, `tokens`, ...), benchmark scores and the last value of each metric. A
cell that has not run is a row with its state and NaN, never 0. docs/run-folder.md
describes the folders; `analysis/stores.py` reads MLflow.
"""

import hashlib
import json
import os
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.errors import ASKED
from analysis.history import assemble, cached, last_values, read_folder
from analysis.holder import alive
from analysis.pooling import SETTINGS
from analysis.records import NUMBER, Types, mismatch, no_numbers, parse_lines, parse_object

SCHEMA = 1
_ENDED = ("finished", "diverged", "failed", "interrupted")
_MEMBER = {"fingerprint": str, "label": str}
_CELL = {"schema": int, "science": dict}
_LEASE: Types = {"host": str, "pid": int, "process_start": NUMBER}
_EVALUATION = {"scores": list}
_PROTOCOL: Types = dict.fromkeys(
    ("stderr", "version", "num_fewshot", "prompt_hash", "lm_eval"), object
)
_SCORE: Types = {"name": str, "task": str, "value": NUMBER, "n": int, **_PROTOCOL}
_UPSTREAM = "upstream.run"
_INPUT = re.compile(r"inputs\.[^.]+\.runs")


@dataclass(frozen=True)
class Runs:
    """The runs of a sweep.

    Args:
        table: a row for each cell, also for those that never ran.
        history: columns fingerprint, step, key, value; later attempts win.
        notes: what could not be read; printed under figures.
        root: where the run folders are, None of runs that came from a store.
    """

    table: pd.DataFrame
    history: pd.DataFrame
    notes: tuple[str, ...] = ()
    root: Path | None = None

    @property
    def finished(self) -> pd.DataFrame:
        """The rows of finished cells, those that may enter a figure."""
        return self.table[self.table["state"] == "finished"]

    def count(self) -> str:
        """Return a sentence: the number of cells by state, and the notes."""
        states = self.table["state"].value_counts()
        counts = ", ".join(f"{n} {state}" for state, n in states.items())
        return "; ".join([f"{len(self.table)} cells: {counts}", *self.notes])

    def positions(self) -> pd.DataFrame:
        """Return the loss at each position of a sequence: columns fingerprint, position, loss, n.

        Raises:
            ValueError: no run folder has it, since none was trained with eval.details=true, or the
                runs came from a store.
        """
        parts = []
        for run in self.table["fingerprint"]:
            content = _read(f"{self.root}/runs/{run}/positions.json") if self.root else None
            if content is not None:
                parts.append(pd.DataFrame(json.loads(content)).assign(fingerprint=run))
        if not parts:
            raise ValueError(
                "no run folder has positions.json: train with eval.details=true, and read by "
                "from_folders"
            )
        return pd.concat(parts, ignore_index=True)[["fingerprint", "position", "loss", "n"]]

    def _repr_html_(self) -> str:
        """Return HTML for a notebook: the table, above it the number of cells by state."""
        return f"<p>{self.count()}</p>{self.table.to_html(max_rows=20, max_cols=20)}"

    def curves(self, key: str, x: str) -> pd.DataFrame:
        """Return the curves of metric `key`: columns fingerprint, x, value.

        Args:
            x: step, tokens, flops or wall_s. Where it was not logged at a step it is interpolated
                between the lines around; values before its first and after its last line are left
                out.

        Raises:
            KeyError: no run has the metric; names those that there are.
        """
        known = sorted(self.history["key"].unique())
        for name in (key, x):
            if name not in known and name != "step":
                raise KeyError(f"no run has the metric {name!r}; there are: {', '.join(known)}")
        values = self.history[self.history["key"] == key]
        if x == "step":
            return values.assign(x=values["step"])[["fingerprint", "x", "value"]]
        logged = self.history[self.history["key"] == x].sort_values("step")
        positions = pd.Series(np.nan, index=values.index)
        for run, axis in logged.groupby("fingerprint"):
            of_run = values["fingerprint"] == run
            positions[of_run] = np.interp(
                values["step"][of_run], axis["step"], axis["value"], np.nan, np.nan
            )
        return values.assign(x=positions).dropna(subset="x")[["fingerprint", "x", "value"]]


def from_folders(root: Path, sweep: str, *, cache: bool = True) -> Runs:
    """Return the runs of `sweep` under `root` (the folder that holds runs/ and sweeps/).

    Args:
        cache: store the histories as sweeps/<sweep>/history.parquet; only changed runs are read.

    Raises:
        FileNotFoundError: there is no such sweep.
        ValueError: a cell was written by a newer Espalier, or a file is damaged; it is named.
    """
    listing = root / "sweeps" / sweep / "cells.jsonl"
    if not listing.exists():
        raise FileNotFoundError(f"{listing} does not exist; run the sweep first, or name its root")
    members = {row["fingerprint"]: row for row in _lines(listing)}
    late = {r for r, row in members.items() if is_late(row.get("choices", {}), members)}
    members = {run: row for run, row in members.items() if run not in late}
    folders = {run: f"{root}/runs/{run}" for run in members}
    sciences = _Sciences(root)
    rows, settings, judged = [], set(), {}
    for run, member in members.items():
        chosen, science = member.pop("choices", {}), sciences.columns(run)
        scores, judged[run] = _scores(folders[run])
        rows.append(member | chosen | _facts(folders[run], science) | scores)
        settings |= set(chosen) | set(science)
    stamps = {run: _stamp(f"{folder}/metrics.jsonl") for run, folder in folders.items()}
    history = cached(
        listing.with_name("history.parquet") if cache else None,
        stamps,
        lambda runs: assemble(
            p for r in runs for p in read_folder(Path(folders[r]) / "metrics.jsonl", r)
        ),
    )
    table = _with_last(pd.DataFrame(rows), history, judged)
    table.attrs[SETTINGS] = tuple(sorted(settings - {_UPSTREAM}))
    return Runs(table, history, root=root)


def is_late(choices: Mapping[str, Any], runs: Container[str]) -> bool:
    """Return whether a cell evaluates one of `runs`, whose row has what it found."""
    return str(choices.get("evaluates", "")).removeprefix("run:") in runs


def _with_last(
    table: pd.DataFrame, history: pd.DataFrame, judged: Mapping[str, Mapping[str, int]]
) -> pd.DataFrame:
    """Return the table with the last value of each metric, also in place of a fact of its name.

    Args:
        judged: by run, the step that each value of an evaluation is of; it stands if the run itself
            has none of a later step: it may have been evaluated again since.
    """
    last = last_values(history).reindex(table["fingerprint"])
    steps = last_values(history.assign(value=history["step"].where(history["value"].notna())))
    last.index = table.index
    for name in last.columns.intersection(table.columns):
        stands = [
            judged.get(run, {}).get(name, -1) >= steps[name].get(run, -1)
            for run in table["fingerprint"]
        ]
        last[name] = last[name].where(last[name].notna() & ~np.array(stands), table[name])
    return table.drop(columns=last.columns, errors="ignore").join(last)


def _stamp(file: str) -> str:
    try:
        status = os.stat(file)
    except FileNotFoundError:
        return ""
    return f"{status.st_mtime_ns}.{status.st_size}"


class _Sciences:
    """The science keys of the runs under `root`, each cell.json read once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._read: dict[str, dict[str, Any]] = {}

    def columns(self, run: str) -> dict[str, Any]:
        """Return the keys of `run`, lists as JSON.

        Of its inputs it has beside their names what tells them apart but for the seed:
        `upstream.settings` and `inputs.NAME.settings`.
        """
        keys = self._of(run)
        inputs = {_UPSTREAM: [keys[_UPSTREAM]]} if _UPSTREAM in keys else {}
        inputs |= {k: v for k, v in keys.items() if _INPUT.fullmatch(k)}
        settings = {
            f"{key.rpartition('.')[0]}.settings": " ".join(sorted(map(self._settings, runs)))
            for key, runs in inputs.items()
        }
        kept = {k: v for k, v in keys.items() if k == _UPSTREAM or k not in inputs}
        text = {k: json.dumps(v) for k, v in kept.items() if isinstance(v, (list, dict))}
        return kept | text | settings

    def _of(self, run: str) -> dict[str, Any]:
        if run not in self._read:
            file = self.root / "runs" / run / "cell.json"
            cell = parse_object(file, file.read_bytes(), _CELL)
            if cell["schema"] > SCHEMA:
                raise ValueError(
                    f"{file} has schema {cell['schema']}, this analysis reads {SCHEMA}; "
                    "update Espalier"
                )
            self._read[run] = cell["science"]
        return self._read[run]

    def _settings(self, run: str) -> str:
        """Return a hash of the keys of `run` without its seed; `run` itself if it is not here."""
        try:
            keys = self.columns(run)
        except FileNotFoundError:
            return run
        text = json.dumps({k: v for k, v in keys.items() if k not in ("seed", _UPSTREAM)})
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def _facts(folder: str, science: dict[str, Any]) -> dict[str, Any]:
    file = Path(folder, "summary.json")
    facts = parse_object(file, _read(str(file)) or b"{}", {})
    return {"state": _state(folder)} | science | facts


def _scores(folder: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the values of a run's evaluations and its benchmark scores, and the steps, by name.

    A score is `task/metric`, beside it its standard error and how it was taken. Of two evaluations
    of a task the one with more questions counts, of equals the later one.
    """
    best: dict[str, tuple[tuple[int, float], dict[str, Any]]] = {}
    scores: dict[str, Any] = {}
    steps: dict[str, int] = {}
    for file in sorted(Path(folder).glob("evals/*.json"), key=os.path.getmtime):
        when, record = file.stat().st_mtime, parse_object(file, file.read_bytes(), _EVALUATION)
        values = record.get("values", {})
        problems = [no_numbers(values), *(mismatch(row, _SCORE) for row in record["scores"])]
        if any(problems):
            raise ValueError(f"{file}: a score {next(filter(None, problems))}; mend or remove it")
        scores |= values
        steps |= dict.fromkeys(values, record.get("step", 0))
        for row in record["scores"]:
            rank = (row["n"], when)
            if row["name"] not in best or best[row["name"]][0] < rank:
                best[row["name"]] = rank, row | {"step": record.get("step", 0)}
    for name, (_, row) in best.items():
        error = row["stderr"]
        scores |= {name: row["value"], f"{name}_stderr": float("nan") if error is None else error}
        steps |= dict.fromkeys((name, f"{name}_stderr"), row["step"])
        scores[f"{row['task']}{ASKED}"] = (
            f"version {row['version']}, {row['n']} questions, {row['num_fewshot']} shots, "
            f"prompts {row['prompt_hash']}, lm-eval {row['lm_eval']}{_cut(row)}"
        )
    return scores, steps


def _cut(row: dict[str, Any]) -> str:
    return f", cut to {row['cut_to']} tokens" if row.get("cut_to") is not None else ""


def _state(folder: str) -> str:
    """Return the state by rule 2 of docs/run-folder.md."""
    try:
        names = sorted(filter(str.isdigit, os.listdir(f"{folder}/attempts")), reverse=True)
    except FileNotFoundError:
        return "new"
    for name in names:
        attempt = Path(folder, "attempts", name)
        lease = _read(f"{attempt}/lease.json")
        if lease is not None:
            file = attempt / "events.jsonl"
            content = (_read(str(file)) or b"").rpartition(b"\n")[0]
            events = parse_lines(file, content, lambda line: mismatch(line, {"event": str}))
            ends = [line["event"] for line in events if line["event"] in _ENDED]
            if ends:
                return str(ends[-1])
            holder = parse_object(attempt / "lease.json", lease, _LEASE)
            return "running" if alive(attempt, holder) else "interrupted"
    return "new"


def _read(file: str) -> bytes | None:
    try:
        with open(file, "rb", buffering=0) as opened:
            return opened.read()
    except FileNotFoundError:
        return None


def _lines(file: Path) -> list[dict[str, Any]]:
    content = file.read_bytes().rpartition(b"\n")[0]
    return parse_lines(file, content, lambda line: mismatch(line, _MEMBER, {"choices": dict}))
