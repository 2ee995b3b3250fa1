"""Sections of the status page: totals, the grid as a heat map, figures by question, what next."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

from runner.records import journal
from runner.records.cells import Cell
from runner.views.axes import Values

QUESTIONS = (  # beginnings of the names of figures, and what the figures answer
    (("map_", "lr_by_"), "Which settings are best?"),
    (("val_loss_by_parameters", "val_bound_by_parameters"), "What does size bring?"),
    (("pareto",), "What do compute, time and memory bring?"),
    (("val_loss_by_", "val_bound_by_"), "How fast does the loss fall?"),
)
_SHADES = 8  # of the heat map, styles .h0 (best) to .h7
_FEW_SIZES = 3


@dataclass(frozen=True)
class Ended:
    """A cell with its state, its last value of the measure and its seconds of training."""

    cell: Any
    state: str
    value: float | None
    wall_s: float


def totals(rows: Sequence[Ended]) -> str:
    """Return a sentence: hours of training, and of processes and GPUs held for it."""
    hours = sum(row.wall_s for row in rows) / 3600
    held = {"process": 0.0, "GPU": 0.0}
    for row in rows:
        if isinstance(row.cell, Cell):
            resources = row.cell.config.resources
            held["process"] += row.wall_s / 3600 * resources.num_processes
            held["GPU"] += row.wall_s / 3600 * (resources.gpus or 0) * resources.nodes
    shown = [f"{hours:,.2f} hours of training"]
    if held["GPU"]:
        shown.append(f"{held['GPU']:,.2f} GPU-hours")
    elif held["process"] > 1.01 * hours:
        shown.append(f"{held['process']:,.2f} process-hours")
    lost = sum(row.wall_s for row in rows if row.state in ("failed", "diverged")) / 3600
    if lost:
        shown.append(f"{lost:,.2f} of them in cells that failed or diverged")
    return ", ".join(shown)


def heat_map(rows: Sequence[Ended], values: Values, measure: str) -> str:
    """Return a table over the first two axes: means of a measure, shaded; "" without an axis.

    Over further axes the best is shown, over seeds the mean. A hole tells its cells' states.
    """
    axes = axes_without_seeds(values)
    if not axes:
        return ""
    down, across = (axes[0], axes[1]) if len(axes) > 1 else ("", axes[0])
    places: dict[tuple[str, str], list[Ended]] = {}
    for row in rows:
        own = values.get(row.cell.fingerprint, {})
        places.setdefault((_word(own.get(down, "")), _word(own.get(across))), []).append(row)
    found = {place: _best(inside, values, axes) for place, inside in places.items()}
    ranked = sorted(value for value, _ in found.values() if value is not None)
    downs, acrosses = (list(dict.fromkeys(place[i] for place in places)) for i in (0, 1))
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in acrosses)
    body = []
    for name in downs:
        cells = "".join(
            _place(places.get((name, other), []), found.get((name, other)), ranked)
            for other in acrosses
        )
        body.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    more = f"; the best over {escape(', '.join(axes[2:]))}" if len(axes) > 2 else ""
    title = f"{escape(measure.replace('_', ' '))} by {escape(' and '.join(axes[:2]))}{more}"
    corner = f'<th class="text">{escape(down)} \\ {escape(across)}</th>' if down else "<th></th>"
    return (
        f'<h2>Grid</h2><p class="sub">{title}; the mean over seeds</p><div class="scroll">'
        f'<table class="heat"><thead><tr>{corner}{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def axes_without_seeds(values: Values) -> list[str]:
    """Return the axes but for seeds."""
    axes = dict.fromkeys(axis for own in values.values() for axis in own)
    return [axis for axis in axes if axis.rpartition(".")[2] != "seed"]


def _best(rows: Iterable[Ended], values: Values, axes: Sequence[str]) -> tuple[float | None, int]:
    """Return (the lowest mean over seeds, its number of runs) of the cells at a place."""
    recipes: dict[str, list[float]] = {}
    for row in rows:
        if row.value is not None and row.state == "finished":
            own = values.get(row.cell.fingerprint, {})
            recipes.setdefault(str([own.get(axis) for axis in axes]), []).append(row.value)
    means = [(mean(losses), len(losses)) for losses in recipes.values()]
    return min(means) if means else (None, 0)


def _place(
    inside: Sequence[Ended], best: tuple[float | None, int] | None, ranked: list[float]
) -> str:
    value, count = best or (None, 0)
    if value is None:
        states = ", ".join(sorted({row.state for row in inside})) or "no cell"
        return f'<td class="hole">{states}</td>'
    shade = min(_SHADES - 1, ranked.index(value) * _SHADES // len(ranked))
    failed = sum(row.state in ("failed", "diverged") for row in inside)
    note = f"n={count}" + (f", {failed} failed" if failed else "")
    said = note.replace("failed", "failed or diverged")
    return f'<td class="h{shade}" title="{said}">{value:.3f}<small>{note}</small></td>'


def figures(files: Sequence[Path]) -> str:
    """Return the figures under the questions that they answer; others come first."""
    if not files:
        return ""
    parts = []
    for question, group in groupby(by_question(files), key=_question):
        images = "".join(map(_figure, group))
        parts.append(f'<h2>{question or "Figures"}</h2><div class="figures">{images}</div>')
    return "".join(parts)


def by_question(files: Sequence[Path]) -> list[Path]:
    """Return the figures in the order of the questions that they answer; others come first."""
    order = [question for _, question in QUESTIONS]
    return sorted(files, key=lambda f: order.index(_question(f)) if _question(f) else -1)


def _question(file: Path) -> str:
    return next((text for begins, text in QUESTIONS if file.stem.startswith(begins)), "")


def _figure(file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    image = f'<img alt="{escape(file.stem)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}</figure>"


def what_next(name: str, rows: Sequence[Ended], values: Values, drawn: bool) -> str:
    """Return a list of what is worth running now."""
    found: list[tuple[str, str]] = []
    states = [row.state for row in rows]
    if states.count("failed"):
        text = f"{_cells(states.count('failed'))} failed"
        found.append((text, f"espalier failures {name}; espalier retry {name}"))
    open_cells = sum(state not in (*journal.FINAL, "failed", "running") for state in states)
    if open_cells:
        way = f"espalier status {name}"
        found.append((f"{_cells(open_cells)} not ended: the sweep's own command goes on", way))
    found += _edges(rows, values)
    axes = axes_without_seeds(values)
    recipes = {str([own.get(a) for a in axes]) for own in values.values()}
    if values and len(recipes) == len(values):
        found.append(("each point has one seed, so nothing tells noise from effect", "seed=1,2,3"))
    if not drawn:
        found.append(("no figures yet", f"espalier plots {name}; espalier report {name}"))
    if _num_sizes(rows) >= _FEW_SIZES:
        line = f"python -m analysis fit sweeps/{name}; python -m analysis design --help"
        found.append(("sizes differ: a law can be fitted, and further sizes chosen by it", line))
    if not found:
        return ""
    items = "".join(f"<li>{escape(text)}: <code>{escape(way)}</code></li>" for text, way in found)
    return f"<h2>What next</h2><ul>{items}</ul>"


def _cells(count: int) -> str:
    return f"{count} cell{'s' if count != 1 else ''}"


def _edges(rows: Sequence[Ended], values: Values) -> list[tuple[str, str]]:
    """Return the numeric axes whose best value is the smallest or the largest tried."""
    found = []
    done = [row for row in rows if row.value is not None and row.state == "finished"]
    for axis in axes_without_seeds(values):
        if axis.startswith(("model.", "train.")) or "." not in axis:
            continue  # a larger model or a longer run is better by nature
        numbers: dict[float, list[float]] = {}
        for row in done:
            number = values.get(row.cell.fingerprint, {}).get(axis)
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                numbers.setdefault(number, []).append(row.value or 0.0)
        if len(numbers) < _FEW_SIZES:
            continue
        best = min(numbers, key=lambda number: mean(numbers[number]))
        if best in (min(numbers), max(numbers)):
            beyond = best * best / sorted(numbers)[1 if best == min(numbers) else -2]
            way = f"{axis}={beyond:.2g}"
            found.append((f"the best {axis}, {best:g}, is at the edge of the grid", way))
    return found


def _num_sizes(rows: Sequence[Ended]) -> int:
    sizes = set()
    for row in rows:
        if isinstance(row.cell, Cell) and row.state == "finished":
            model = row.cell.config.model
            sizes.add(repr(model))
    return len(sizes)


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def measured(rows: Mapping[str, Any], measure: str) -> float | None:
    """Return the last value of a measure, None where it is missing or no number."""
    value = rows.get(measure)
    return None if value is None or value != value else float(value)
