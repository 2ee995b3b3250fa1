"""A prediction that is written down before the run it predicts, and its score afterwards."""

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.errors import require
from analysis.fit import Fit


def forecast(found: Fit, points: pd.DataFrame) -> pd.DataFrame:
    """Return `points` with loss, low, high: a 95% interval for a new run, law and noise of runs together.

    Args:
        points: a row for each run to come, columns as the law names them.

    Raises:
        KeyError: a column of the law is missing.
    """
    require(points, list(found.law.columns))
    data = {name: points[name].to_numpy(dtype=float) for name in found.law.columns}
    response = found.law.response
    best = response(found.law.predict(found.theta, data))
    drawn = response(found.law.predict(found.draws, data))
    spread = np.sqrt(drawn.std(axis=0, ddof=1) ** 2 + found.noise**2)
    half = stats.t.ppf(0.975, max(1, len(found.used) - len(found.theta))) * spread
    turn = np.exp if found.law.log else np.asarray
    return points.assign(loss=turn(best), low=turn(best - half), high=turn(best + half))


def write_forecast(found: Fit, points: pd.DataFrame, file: Path, **facts: Any) -> pd.DataFrame:
    """Write the forecast with the time and what it rests on; an existing one is not overwritten.

    Raises:
        FileExistsError: a forecast that can be changed afterwards is none.
    """
    table = forecast(found, points)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    named = {k: float(v) for k, v in found.law.named(found.theta).items()}
    body = {
        "schema": 1,
        "written": now,
        "law": found.law.name,
        "parameters": named,
        **facts,
        "points": table.to_dict(orient="records"),
    }
    with file.open("x") as out:
        out.write(json.dumps(body, indent=1) + "\n")
    return table


def score(file: Path, runs: pd.DataFrame, *, columns: dict[str, str], loss: str) -> pd.DataFrame:
    """Return each forecast point with what was measured: n runs, mean, relative error, inside the interval.

    Args:
        columns: the law's columns by the table's names, as for the fit; runs agree with a point to 1%.
    """
    body = json.loads(file.read_text())
    points = pd.DataFrame(body["points"])
    names = {
        name: columns.get(name, name)
        for name in points.columns
        if name not in ("loss", "low", "high")
    }
    require(runs, [*names.values(), loss])
    rows = []
    for point in points.to_dict(orient="records"):
        near = np.ones(len(runs), dtype=bool)
        for name, column in names.items():
            near &= np.isclose(runs[column].to_numpy(dtype=float), point[name], rtol=1e-2)
        measured = runs.loc[near, loss].dropna()
        mean = float(measured.mean()) if len(measured) else np.nan
        inside = bool(point["low"] <= mean <= point["high"]) if len(measured) else None
        rows.append(
            point
            | {
                "runs": len(measured),
                "measured": mean,
                "error": point["loss"] / mean - 1,
                "inside": inside,
            }
        )
    return pd.DataFrame(rows)
