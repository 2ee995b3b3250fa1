"""The table before anything runs: each cell's state, size, tokens, FLOPs and expected time.

The time comes from finished runs under the same root at the same precision on this host (median
FLOP/s); where there is none it stays open.
"""

import json
import socket
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from rich.table import Table

from models.flops import training_flops
from runner import journal
from runner.sweep.cells import Cell
from runner.sweep.live import tail

_WILL_RUN = ("new", "interrupted")


def facts(cell: Cell) -> dict[str, Any]:
    """Return parameters, steps, tokens and FLOPs of a cell; empty while its vocabulary is unknown."""
    cfg = cell.config
    summary = cell.folder / "summary.json"
    if summary.exists():
        known: dict[str, Any] = json.loads(summary.read_text())
        return known
    vocab = cfg.tokenizer.planned_vocab_size()
    if vocab is None:
        return {}
    seq, batch = cfg.train.sequence_length, cfg.train.batch_size
    flops = training_flops(cfg.model.forward_flops_per_sequence(vocab, seq)[0])
    parameters = cfg.model.num_parameters(vocab)
    steps = cfg.train.num_steps(parameters, flops)
    return {
        "num_parameters": parameters,
        "steps": steps,
        "tokens": steps * batch * seq,
        "flops": steps * batch * flops,
    }


def flops_per_s(root: Path) -> dict[str, float]:
    """Return the median speed of this host's finished runs for each precision, as JSON of its config."""
    speeds: dict[str, list[float]] = {}
    for folder in root.glob("runs/*"):
        tries = journal.attempts(folder)
        if not tries or journal.state(folder) != "finished":
            continue
        speed = tail(folder).get("flops_per_s")
        place = tries[-1] / "environment.json"
        if (
            speed
            and place.exists()
            and json.loads(place.read_text())["host"] == socket.gethostname()
        ):
            science = json.loads((folder / "cell.json").read_text())["science"]
            speeds.setdefault(_precision(science), []).append(speed)
    return {precision: statistics.median(values) for precision, values in speeds.items()}


def plan(cells: list[Cell]) -> tuple[Table, str]:
    """Return the table of `cells` and a line of totals over those that will run."""
    speeds = flops_per_s(Path(cells[0].config.root).resolve())
    table = Table(box=None, pad_edge=False)
    for column in ("cell", "state", "parameters", "steps", "tokens", "FLOPs", "time"):
        table.add_column(column, justify="left" if column in ("cell", "state") else "right")
    states, left_s, flops, unknown = Counter[str](), 0.0, 0.0, 0
    for cell in cells:
        state, known = cell.state, facts(cell)
        states[state] += 1
        speed = speeds.get(_precision(cell.science))
        seconds = known["flops"] / speed if known and speed else None
        if state in _WILL_RUN:
            flops += known.get("flops", 0.0)
            left_s += seconds or 0.0
            unknown += seconds is None
        table.add_row(
            cell.label, state, *(_short(known.get(k)) for k in ("num_parameters", "steps", "tokens")),
            f"{known['flops']:.2e}" if known else "?", _time(seconds),
        )  # fmt: skip
    counts = ", ".join(f"{n} {state}" for state, n in sorted(states.items()))
    total = (
        f"{len(cells)} cells ({counts}); to run: {flops:.2e} FLOPs, {_time(left_s)} of one place"
    )
    return table, total + (f" and {unknown} cells of unknown time" if unknown else "")


def _precision(science: dict[str, Any]) -> str:
    return json.dumps(
        {k: v for k, v in science.items() if k.startswith("precision.")}, sort_keys=True
    )


def _short(value: float | None) -> str:
    if value is None:
        return "?"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:g}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
