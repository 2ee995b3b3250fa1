"""How MLflow's page of a sweep opens: columns, order and description, as tags of the experiment.

The address `#/experiments/ID/runs?viewStateShareKey=espalier`, which `espalier ui` prints, opens
with them; it is the way in which MLflow's own button shares a view.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.machine.errors import DataError
from runner.records.cells import members
from runner.views.axes import axes_of
from runner.views.mlflow_cursors import Cursor
from runner.views.mlflow_runs import clean_name

if TYPE_CHECKING:
    from mlflow import MlflowClient

_KEY = "espalier"
_TAG, _NOTE = f"mlflow.sharedViewState.{_KEY}", "mlflow.note.content"
_METRICS = ("val_loss", "val_bits_per_byte", "tokens_per_s")
_MOST_VALUES = 12


def set_up_page(client: "MlflowClient", experiment: str, root: Path, sweep: str) -> None:
    """Set the tags of a sweep's experiment by which its page opens, where they are not so yet."""
    axes = axes_of(root, sweep)
    tags = {_TAG: json.dumps(_state(axes)), _NOTE: _description(root, sweep, axes)}
    there = client.get_experiment(experiment).tags
    for key, value in tags.items():
        if there.get(key) != value:
            client.set_experiment_tag(experiment, key, value)


def addresses(root: Path, server: str, uri: str) -> list[str]:
    """Return the address of the page of each sweep that a store has, the newest sweep first."""
    lists = sorted(root.glob("sweeps/*/cells.jsonl"), key=lambda f: f.stat().st_mtime)
    found = []
    for name in (file.parent.name for file in reversed(lists)):
        for row in members(root, name):
            with suppress(DataError):  # `espalier sync` names it
                cursor = Cursor(root / "runs" / row["fingerprint"], name, uri).read()
                if "experiment" in cursor:
                    page = f"#/experiments/{cursor['experiment']}/runs?viewStateShareKey={_KEY}"
                    found.append(f"{name}: {server}/{page}")
                    break
    return found


def _state(axes: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Return the view: our columns, sorted by val_loss, runs of all times."""
    columns = [f"metrics.`{key}`" for key in _METRICS] + ["tags.`state`"]
    columns += [f"params.`{clean_name(key)}`" for key in axes]
    return {
        "searchFilter": "",
        "orderByKey": "metrics.`val_loss`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": columns,
        "columnOrder": columns,
    }


def _description(root: Path, sweep: str, axes: Mapping[str, Sequence[Any]]) -> str:
    """Return Markdown: the grid, and the commands that say more."""
    count = len(members(root, sweep))
    lines = [f"**{count} cells** of `{sweep}`", ""]
    for key, values in axes.items():
        shown = ", ".join(map(str, values[:_MOST_VALUES]))
        more = f" and {len(values) - _MOST_VALUES} more" if len(values) > _MOST_VALUES else ""
        lines.append(f"- {key}: {shown}{more}")
    lines += ["", f"Figures and verdict: `espalier report {sweep}`, {_report(root, sweep)}"]
    return "\n".join(lines)


def _report(root: Path, sweep: str) -> str:
    return f"which writes `{root / 'sweeps' / sweep / 'report.html'}`."
