"""The commands about runs to come: predict them, score the prediction, choose the next ones."""

import errno
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from analysis.commands.options import (
    Bootstrap,
    Cluster,
    Column,
    D,
    Delta,
    Fix,
    Holdout,
    LawName,
    Loss,
    N,
    Residuals,
    RunsFile,
    Seed,
    Where,
    X,
    claim,
    column_names,
    find_law,
    positive,
    progress_bar,
    read_table,
    split_pair,
    write,
)
from analysis.design import as_sweep
from analysis.design import design as choose_runs
from analysis.errors import require
from analysis.fit import fit
from analysis.forecast import score as score_forecast
from analysis.forecast import write_forecast
from analysis.identification import extrapolation, unidentified
from analysis.laws import CHINCHILLA
from analysis.outputs import check_folder, sha256
from analysis.report import origin


def forecast(
    runs: RunsFile,
    at: Annotated[list[str], typer.Option(help="a run to come: n=1e9,d=2e10; again for more")],
    law: LawName = "chinchilla",
    n: N = "num_parameters",
    d: D = "tokens",
    x: X = "flops",
    column: Column = None,
    loss: Loss = "val_loss",
    where: Where = None,
    holdout: Holdout = None,
    fix: Fix = None,
    residuals: Residuals = "log",
    cluster: Cluster = None,
    delta: Delta = 1e-3,
    bootstrap: Bootstrap = 1000,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="JSON, never overwritten")] = Path("forecast.json"),
) -> None:
    """Predict runs that have not been made; write it down with the time and the input."""
    found = find_law(law, fix, residuals)
    names, points = column_names(found.columns, n, d, x, column), run_points(at, found.columns)
    if out.exists():
        raise FileExistsError(errno.EEXIST, "exists", str(out))
    check_folder(out.parent)
    source = read_table(runs, *names.values(), loss, where=where)
    with progress_bar() as progress:
        fitted = fit(
            source.table,
            found,
            columns=names,
            loss=loss,
            holdout=holdout,
            cluster=cluster,
            delta=delta,
            bootstraps=bootstrap,
            seed=seed,
            progress=progress,
        )
    doubts = unidentified(fitted) + extrapolation(fitted, points)
    out.parent.mkdir(parents=True, exist_ok=True)
    table = write_forecast(fitted, points, out, doubts=doubts, **origin(source))
    print(table.to_string(index=False))
    print(*doubts, fitted.counts(), out, sep="\n")


def score(
    file: Annotated[
        Path, typer.Argument(exists=True, metavar="FORECAST", help="what `forecast` wrote")
    ],
    runs: RunsFile,
    n: N = "num_parameters",
    d: D = "tokens",
    x: X = "flops",
    column: Column = None,
    loss: Loss = "val_loss",
    where: Where = None,
    out: Annotated[Path, typer.Option(help="JSON; a CSV goes beside it")] = Path("score.json"),
) -> None:
    """Compare a forecast with what was measured since."""
    outputs = claim("score", out, [file, runs], texts=[".csv"])
    read = sha256(file)
    names = column_names(_forecast_columns(file), n, d, x, column)
    source = read_table(runs, *names.values(), loss, where=where)
    points = score_forecast(file, source.table, columns=names, loss=loss)
    print(points.to_string(index=False))
    body = {"forecast": str(file), "forecast_sha256": read, "points": points.to_dict("records")}
    print(write(outputs, source, body, texts={".csv": points.to_csv(index=False)}))


def design(
    runs: RunsFile,
    target: Annotated[
        float, typer.Option(help="FLOPs of the run whose loss is to be known", callback=positive)
    ],
    keys: Annotated[str, typer.Option(help="keys that make a shape: model.width,model.depth")],
    budget: Annotated[float | None, typer.Option(help="FLOPs to spend", callback=positive)] = None,
    gpu_hours: Annotated[
        float | None, typer.Option(help="instead of --budget, with --rate", callback=positive)
    ] = None,
    rate: Annotated[
        float, typer.Option(help="FLOP/s that a GPU reaches in training", callback=positive)
    ] = 4e14,
    shapes: Annotated[
        Path | None,
        typer.Option(help="CSV of n and keys: shapes to choose from; default: those of RUNS"),
    ] = None,
    n: N = "num_parameters",
    d: D = "tokens",
    loss: Loss = "val_loss",
    where: Where = None,
    bootstrap: Bootstrap = 1000,
    seed: Seed = 0,
    name: Annotated[str, typer.Option(help="of the sweep")] = "next",
    out: Annotated[Path, typer.Option(help="the sweep; the numbers go beside it as JSON")] = Path(
        "sweep.yaml"
    ),
) -> None:
    """Propose the runs that most reduce the uncertainty of a prediction, as a sweep to run."""
    if (budget is None) == (gpu_hours is None):
        raise ValueError("give one of --budget and --gpu-hours")
    flops = budget if budget is not None else float(gpu_hours or 0.0) * 3600 * rate
    outputs = claim("design", out.with_suffix(".json"), [runs, shapes], texts=[out.suffix])
    source, names = read_table(runs, n, d, loss, where=where), keys.split(",")
    table = source.table
    columns = {"n": n, "d": d}
    fitted = fit(table, CHINCHILLA, columns=columns, loss=loss, bootstraps=bootstrap, seed=seed)
    given = read_table(shapes, "n") if shapes else None
    choices = given.table if given else table.assign(n=table[n])
    require(choices, ["n", *names])
    choices = choices[["n", *names]].drop_duplicates()
    proposed = choose_runs(fitted, choices, budget=flops, target=target)
    print(proposed.runs.to_string(index=False))
    print(
        f"relative standard error of the loss at {target:.3g} FLOPs: {proposed.before:.2%} now, "
        f"{proposed.after:.2%} then"
    )
    sweep = {out.suffix: as_sweep(proposed, name=name)}
    body = proposed.report() | {"shapes_sha256": given.sha256 if given else None}
    print(write(outputs, source, body, texts=sweep))


def run_points(at: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """Return a row for each text "n=1e9,d=2e10".

    Raises:
        ValueError: a text does not give each of `columns` once, or no positive number.
    """
    points = []
    for text in at:
        pairs = [split_pair(part) for part in text.split(",")]
        given = {name.strip(): _number(value) for name, value in pairs}
        if sorted(name.strip() for name, _ in pairs) != sorted(columns):
            raise ValueError(f"--at {text} must give {', '.join(columns)}, each once")
        wrong = [name for name, value in given.items() if not 0 < value < math.inf]
        if wrong:
            raise ValueError(f"--at {text}: {wrong[0]} must be a finite number above 0")
        points.append(given)
    return pd.DataFrame(points)


def _number(text: str) -> float:
    """Return the number in `text`, NaN where it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _forecast_columns(file: Path) -> list[str]:
    """Return the columns of the law that a forecast was made by.

    Raises:
        ValueError: the file is no forecast.
    """
    try:
        points = json.loads(file.read_bytes())["points"]
        return [name for name in points[0] if name not in ("loss", "low", "high")]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{file} is no forecast, as `forecast` writes it") from error
