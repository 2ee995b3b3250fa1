"""How MLflow's page of a sweep opens: columns, order, charts and description, as tags.

    #/experiments/ID/runs?viewStateShareKey=espalier                          the table of runs
    #/experiments/ID/runs?viewStateShareKey=espalier&compareRunsMode=CHART    their charts

open with them; it is the way in which MLflow's own button shares a view. `espalier ui` prints both.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.machine.environment import first_record
from runner.machine.errors import DataError
from runner.records.cells import members
from runner.views.axes import axes_of
from runner.views.mlflow_cursors import Cursor
from runner.views.mlflow_runs import clean_name
from runner.views.sweep_story import figure_file, read_story

if TYPE_CHECKING:
    from mlflow import MlflowClient

_KEY = "espalier"
_TAG, _NOTE = f"mlflow.sharedViewState.{_KEY}", "mlflow.note.content"
_FURTHER = ("val_bits_per_byte", "tokens_per_s")
_MOST_VALUES = 12
_LONGEST = 4800  # characters of a tag of an experiment, of which a store holds 5000
_SECTIONS = (  # uuid, name, open; the two below are named as MLflow names its own
    ("results", "Results", True),
    ("more", "Model metrics", False),
    ("system", "System metrics", False),
)
_MOST_CURVES = 50


def set_up_page(client: "MlflowClient", experiment: str, root: Path, sweep: str, uri: str) -> None:
    """Set the tags of a sweep's experiment by which its page opens, where they are not so yet.

    The first run that the store has holds the figure among its artifacts.
    """
    axes, count = axes_of(root, sweep), len(members(root, sweep))
    figure, holder = figure_file(root, sweep), _first(root, sweep, uri, "run_id")
    there, address = client.get_experiment(experiment).tags, ""
    if figure.exists() and holder is not None:
        digest = hashlib.sha256(figure.read_bytes()).hexdigest()[:8]
        address = f"get-artifact?path={figure.name}&run_uuid={holder}&sha256={digest}"
        if address not in there.get(_NOTE, ""):
            client.log_artifact(holder, str(figure))
    measure, best = _measure(root, sweep)
    state = json.dumps(_state(axes, count, measure, best))
    if len(state) > _LONGEST:  # by keys with very long names
        state = json.dumps(_state({}, count, measure, best))
    tags = {_TAG: state, _NOTE: _description(root, sweep, axes, count, address)}
    for key, value in tags.items():
        if there.get(key) != value:
            _set_tag(client, experiment, key, value)


def _set_tag(client: "MlflowClient", experiment: str, key: str, value: str) -> None:
    """Set a tag; of two uploaders that make it at once the store refuses one, who then sets it."""
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    try:
        client.set_experiment_tag(experiment, key, value)
    except MlflowException:
        client.set_experiment_tag(experiment, key, value)


def addresses(root: Path, server: str, uri: str) -> list[str]:
    """Return the addresses of the page of each sweep that a store has, the newest sweep first."""
    lists = sorted(root.glob("sweeps/*/cells.jsonl"), key=lambda f: f.stat().st_mtime)
    found = []
    for name in (file.parent.name for file in reversed(lists)):
        experiment = _first(root, name, uri, "experiment")
        if experiment is not None:
            page = f"{server}/#/experiments/{experiment}/runs?viewStateShareKey={_KEY}"
            found.append(f"{name}: {page}\n  compare: {page}&compareRunsMode=CHART")
    return found


def _first(root: Path, sweep: str, uri: str, entry: str) -> str | None:
    """Return an entry of the first cursor of a sweep that has it, None where none has."""
    for row in members(root, sweep):
        with suppress(DataError):  # `espalier sync` names it
            cursor = Cursor(root / "runs" / row["fingerprint"], sweep, uri).read()
            if entry in cursor:
                return str(cursor[entry])
    return None


def _measure(root: Path, sweep: str) -> tuple[str, str]:
    """Return what the runs are judged by, ("val_loss", "min") before one has begun."""
    for row in members(root, sweep):
        with suppress(DataError):
            record = first_record(root / "runs" / row["fingerprint"])
            if "measure" in record:
                name, best = record["measure"]
                return name, best
    return "val_loss", "min"


def _state(
    axes: Mapping[str, Sequence[Any]], count: int, measure: str, best: str
) -> dict[str, Any]:
    """Return the view of `count` runs: our columns, the best run first, charts of the measure."""
    judged = [measure, *_FURTHER]
    params = [clean_name(key) for key in axes]
    columns = [f"metrics.`{key}`" for key in judged] + ["tags.`state`"]
    columns += [f"params.`{key}`" for key in params]
    sections = [
        {"uuid": uuid, "name": name, "display": is_open, "isReordered": True, "columns": 2}
        for uuid, name, is_open in _SECTIONS
    ]
    return {
        "searchFilter": "",
        "orderByKey": f"metrics.`{measure}`",
        "orderByAsc": best == "min",
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": columns,
        "columnOrder": columns,
        "compareRunSections": sections,
        "compareRunCharts": _charts(judged, params),
        "isAccordionReordered": True,  # keeps the order of the sections
        "runsHiddenMode": "SHOW_ALL" if count <= _MOST_CURVES else "FIRST_20_RUNS",
        "hideEmptyCharts": True,
    }


def _charts(judged: Sequence[str], params: Sequence[str]) -> list[dict[str, Any]]:
    """Return the charts of the first section; MLflow adds those of other metrics to theirs."""
    common = {"metricSectionId": _SECTIONS[0][0], "deleted": False, "runsCountToCompare": 100}
    lines = [
        {"uuid": f"line-{key}", "type": "LINE", "metricKey": key, "isGenerated": True}
        for key in (judged[0], "loss", *judged[1:])
    ]
    line = {
        "lineSmoothness": 0,
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "range": {},
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
        "selectedXAxisMetricKey": "",
    }
    parallel = {
        "uuid": "parallel",
        "type": "PARALLEL",
        "selectedParams": [key for key in params if not key.endswith("seed")],
        "selectedMetrics": [judged[0]],
        "showAllRuns": False,
        "isGenerated": False,
    }
    charts = [common | line | chart | {"displayName": chart["metricKey"]} for chart in lines]
    return [charts[0], common | parallel, *charts[1:]] if params else charts


def _description(
    root: Path, sweep: str, axes: Mapping[str, Sequence[Any]], count: int, figure_address: str
) -> str:
    """Return Markdown: the grid, question and verdict, the figure, and where more is said.

    Folded up, MLflow shows the first line.
    """
    told = read_story(root, sweep)
    by = f" by {', '.join(axes)}" if axes else ""
    lines = [f"**{count} cells** of `{sweep}`{by}", ""]
    for key, values in axes.items():
        shown = ", ".join(map(str, values[:_MOST_VALUES]))
        more = f" and {len(values) - _MOST_VALUES} more" if len(values) > _MOST_VALUES else ""
        lines.append(f"- {key}: {shown}{more}")
    for word in ("question", "verdict"):
        if told.get(word):
            lines += ["", f"**{word.capitalize()}.** {told[word]}"]
    report = f"sweeps/{sweep}/report.html"
    lines += ["", f"More figures: `espalier report {sweep}`, which writes `{report}`."]
    text = "\n".join(lines)
    end = f"\n\n![The sweep's figure]({figure_address})" if figure_address else ""
    room = _LONGEST - len(end)
    return (text if len(text) <= room else f"{text[: room - 3]}...") + end
