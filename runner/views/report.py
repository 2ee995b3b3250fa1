"""The status page: a self-contained HTML file with a sweep's cells, loss curves and failures."""

import csv
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from runner.machine import environment, storage
from runner.machine.errors import DataError
from runner.records import journal, metrics
from runner.records.cells import Cell
from runner.records.failures import clusters
from runner.records.sweep_cells import UnreadableCell
from runner.views import report_sections as sections
from runner.views.axes import values_of
from runner.views.mlflow_cursors import read_entries
from runner.views.speed import tokens_per_s

Row = Cell | UnreadableCell
_PAGE = Path(__file__).with_suffix(".html")
_WIDTH, _HEIGHT, _POINTS = 120, 28, 60
_TEXT = ("cell", "state", "run")  # headings of the first columns
Column = tuple[str, str, int]  # (heading, key of the metric, digits)
_BEFORE: tuple[Column, ...] = (("step", "step", 0), ("loss", "loss", 3))
_AFTER: tuple[Column, ...] = (
    ("bits/byte", "val_bits_per_byte", 4),
    ("tokens/s", "tokens_per_s", 0),
    ("hours", "wall_s", 3),
    ("attempts", "attempts", 0),
)


def write_status_page(
    cells: Sequence[Row],
    name: str,
    file: Path,
    mlflow: str,
    figures: Sequence[Path],
    story: Mapping[str, str] | None = None,
    results: Path | None = None,
) -> None:
    """Write the status page of the `cells` of sweep `name` to `file`.

    Args:
        mlflow: address of the MLflow server that links lead to.
        figures: PNG files to embed.
        story: paragraphs of the experiment (question, verdict) by their names.
        results: the experiment's table, a CSV file.
    """
    states = Counter(cell.state for cell in cells)
    found = [_read(cell) for cell in cells]
    measures = dict.fromkeys(measure for _, measure, _ in found if measure is not None)
    judged = [(key.replace("_", " "), key, 4) for key in measures or ("val_loss",)]
    columns = [*_BEFORE, *judged, *_AFTER]
    measure = next(iter(measures), "val_loss")
    ended = [_ended(cell, rows, measure) for cell, (rows, _, _) in zip(cells, found, strict=True)]
    values = values_of(cells[0].folder.parents[1], name) if cells else {}
    text = Template(_PAGE.read_text(encoding="utf-8")).substitute(
        name=escape(name),
        summary=f"{len(cells)} cells: " + ", ".join(f"{n} {s}" for s, n in sorted(states.items())),
        totals=sections.totals(ended),
        grid=sections.heat_map(ended, values, measure),
        next=sections.what_next(name, ended, values, bool(figures)),
        written=time.strftime("%Y-%m-%d %H:%M"),
        commit=environment.revision()["git_sha"][:9] or "unknown",
        head="".join(_heads(columns)),
        rows="\n".join(
            _row(cell, rows, problem, columns, _links(cell, file.parent, mlflow))
            for cell, (rows, _, problem) in zip(cells, found, strict=True)
        ),
        failures=_failures([cell for cell in cells if isinstance(cell, Cell)]),
        figures=sections.figures(figures),
        story="".join(
            f"<p><b>{escape(k.capitalize())}.</b> {escape(v)}</p>" for k, v in (story or {}).items()
        ),
        results=_results(results),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    storage.write_atomically(file, text)


def is_status_page(file: Path) -> bool:
    """Return whether `file` was written by `write_status_page`."""
    with suppress(OSError), file.open("rb") as stream:
        return b'name="generator" content="espalier report"' in stream.read(1000)
    return False


def _heads(columns: Sequence[Column]) -> list[str]:
    text = [f'<th class="text" scope="col">{name}</th>' for name in _TEXT]
    numbers = [f'<th scope="col">{name}</th>' for name, _, _ in columns]
    return [*text, *numbers, '<th class="text" scope="col">loss by step</th>']


def _read(cell: Row) -> tuple[list[metrics.Line], str | None, str]:
    """Return (rows of metrics, measure, what is damaged)."""
    try:
        rows, measure = metrics.read(cell.folder), metrics.measure_of(cell.folder)
    except DataError as error:
        return [], None, str(error)
    return rows, measure, cell.problem if isinstance(cell, UnreadableCell) else ""


def _row(
    cell: Row, rows: list[metrics.Line], problem: str, columns: Sequence[Column], links: str
) -> str:
    state = cell.state
    values = metrics.last_values(rows) | {"tokens_per_s": tokens_per_s(rows)}
    values["attempts"] = len(journal.attempts(cell.folder)) or None
    if values.get("wall_s") is not None:
        values["wall_s"] /= 3600
    label = escape(cell.label)
    if problem:
        label += f"<br><small>{escape(problem)}</small>"
    badge = f'<span class="state {state}">{state}</span>'
    parts = [
        _text("cell", label),
        _text("state", badge),
        _text("run", links),
    ]
    for heading, key, digits in columns:
        value = values.get(key)
        shown = "" if value is None else f"{value:,.{digits}f}"
        exact = "" if value is None else f"{value:.10g}"
        parts.append(f'<td data-label="{heading}" data-value="{exact}">{shown}</td>')
    parts.append(_text("loss by step", _sparkline(rows)))
    return f"<tr>{''.join(parts)}</tr>"


def _text(heading: str, content: str) -> str:
    return f'<td class="text" data-label="{heading}">{content}</td>'


def _links(cell: Row, page: Path, mlflow: str) -> str:
    links = [cell.fingerprint[:6]]
    log = cell.folder / "log.txt"
    if log.exists():
        links.append(f'<a href="{escape(os.path.relpath(log, page.resolve()))}">log</a>')
    for cursor in sorted((cell.folder / "mlflow").glob("*.json")):
        with suppress(DataError):  # `espalier sync` names it
            ids = read_entries(cursor)
            if ids.keys() >= {"experiment", "run_id"}:
                address = f"{mlflow}/#/experiments/{ids['experiment']}/runs/{ids['run_id']}"
                links.append(f'<a href="{escape(address)}">MLflow</a>')
    return " ".join(dict.fromkeys(links))


def _sparkline(rows: Sequence[dict[str, Any]]) -> str:
    points = {row["step"]: float(row["loss"]) for row in rows if "loss" in row}
    points = {step: loss for step, loss in sorted(points.items()) if abs(loss) < 1e6}  # no nan, inf
    if len(points) < 2:
        return ""
    thin = list(points.items())[:: max(1, len(points) // _POINTS)]
    low, high = min(points.values()), max(points.values())
    last = max(points)
    coordinates = " ".join(
        f"{step / last * _WIDTH:.1f},{_HEIGHT - (loss - low) / ((high - low) or 1) * _HEIGHT:.1f}"
        for step, loss in thin
    )
    title = f"{high:.3f} to {low:.3f}"
    box = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="-1 -1 {_WIDTH + 2} {_HEIGHT + 2}"'
    line = f'<title>{title}</title><polyline points="{coordinates}"/>'
    return f'<svg {box} role="img" aria-label="{title}">{line}</svg>'


def _failures(cells: Sequence[Cell]) -> str:
    groups = clusters(cells)
    if not groups:
        return ""
    blocks = "".join(f"<pre>{escape(group.describe(len(cells)))}</pre>" for group in groups)
    return f"<h2>Failures by cause</h2>{blocks}"


def _results(file: Path | None) -> str:
    if file is None or not file.exists():
        return ""
    head, *rows = list(csv.reader(file.read_text(encoding="utf-8").splitlines()))
    columns = list(zip(*rows, strict=True)) or [()] * len(head)
    numeric = [all(_is_number(value) for value in column) for column in columns]
    kinds = ["" if n else ' class="text"' for n in numeric]
    heads = "".join(
        f'<th scope="col"{k}>{escape(h)}</th>' for h, k in zip(head, kinds, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(_result, head, row, numeric))}</tr>" for row in rows)
    return f"<h2>Results</h2><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _result(heading: str, value: str, numeric: bool) -> str:
    if not numeric:
        return _text(escape(heading), escape(value))
    shown = f"{float(value):.5g}" if value else ""
    return f'<td data-label="{escape(heading)}" data-value="{escape(value)}">{shown}</td>'


def _is_number(value: str) -> bool:
    try:
        return not value or float(value) == float(value)
    except ValueError:
        return False


def _ended(cell: Row, rows: list[metrics.Line], measure: str) -> sections.Ended:
    last = metrics.last_values(rows)
    value = sections.measured(last, measure)
    return sections.Ended(cell, cell.state, value, float(last.get("wall_s", 0.0)))
