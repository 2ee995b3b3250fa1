"""Predictions written down before the runs that they predict, and their scores afterwards."""

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.errors import require
from analysis.fit import Fit

_BOOTSTRAPS = 20


def forecast(fitted: Fit, points: pd.DataFrame) -> pd.DataFrame:
    """Return `points` with columns loss, low, high: a 95% interval for a new run.

    The interval covers the uncertainty of the law, to either side its own, and the noise of runs.

    Args:
        points: a row for each run to come, with the columns of the law.

    Raises:
        KeyError: a column of the law is missing.
        ValueError: a size is not positive, or the fit has fewer than 20 bootstraps.
    """
    require(points, list(fitted.law.columns))
    if len(fitted.draws) < _BOOTSTRAPS:
        raise ValueError(
            f"{len(fitted.draws)} bootstraps give no interval; fit with at least {_BOOTSTRAPS}"
        )
    for name in fitted.law.columns:
        for value in points[name]:
            if not 0 < value < np.inf:
                raise ValueError(f"{name}={value:g} must be a finite number above 0")
    data = {name: points[name].to_numpy(dtype=float) for name in fitted.law.columns}
    response = fitted.law.response
    best = response(fitted.law.predict(fitted.theta, data))
    bootstraps = response(fitted.law.predict(fitted.draws, data))
    below, above = np.quantile(bootstraps, [0.025, 0.975], axis=0)
    wide = stats.t.ppf(0.975, max(1, len(fitted.used) - len(fitted.theta)))
    low, high = (
        best + sign * wide * np.hypot(np.maximum(0.0, sign * (end - best)) / 1.96, fitted.noise)
        for sign, end in ((-1, below), (1, above))
    )
    inverse = np.exp if fitted.law.log else np.asarray
    return points.assign(loss=inverse(best), low=inverse(low), high=inverse(high))


def write_forecast(fitted: Fit, points: pd.DataFrame, file: Path, **facts: Any) -> pd.DataFrame:
    """Return the forecast of `points` after writing it to `file` with the time and the law.

    Args:
        facts: more keys of the file.

    Raises:
        FileExistsError: `file` exists; a forecast is never overwritten.
    """
    table = forecast(fitted, points)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    named = {k: float(v) for k, v in fitted.law.named(fitted.theta).items()}
    body = {
        "schema": 1,
        "written": now,
        "law": fitted.law.name,
        "parameters": named,
        **facts,
        "points": table.to_dict(orient="records"),
    }
    with file.open("x") as out:
        out.write(json.dumps(body, indent=1) + "\n")
    return table


def score(file: Path, runs: pd.DataFrame, *, columns: dict[str, str], loss: str) -> pd.DataFrame:
    """Return each forecast point with the mean of the runs at it.

    Columns beside those of the forecast: runs (their number), measured, error (relative), inside
    (the interval). Runs are at a point where their sizes agree with it to 1%.

    Args:
        columns: the table's name of each column of the law, as for the fit.
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
