"""The commands about runs to come: predict them, score the prediction, choose the next ones."""

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from analysis.commands.options import (
    Bootstrap,
    Column,
    D,
    Delta,
    Holdout,
    LawName,
    Loss,
    N,
    RunsFile,
    Seed,
    Where,
    X,
    column_names,
    find_law,
    finish,
    read_table,
    split_pair,
)
from analysis.design import as_sweep
from analysis.design import design as choose_runs
from analysis.errors import require
from analysis.fit import fit
from analysis.forecast import score as score_forecast
from analysis.forecast import write_forecast
from analysis.laws import CHINCHILLA
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
    delta: Delta = 1e-3,
    bootstrap: Bootstrap = 1000,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="JSON, never overwritten")] = Path("forecast.json"),
) -> None:
    """Predict runs that have not been made; write it down with the time and the input."""
    names = column_names(n, d, x, column)
    fitted = fit(
        read_table(runs, *names.values(), where=where),
        find_law(law),
        columns=names,
        loss=loss,
        holdout=holdout,
        delta=delta,
        bootstraps=bootstrap,
        seed=seed,
    )
    points = pd.DataFrame([_point(text) for text in at])
    print(write_forecast(fitted, points, out, **origin(runs)).to_string(index=False))
    print(f"{fitted.counts()}\n{out}")


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
    names = column_names(n, d, x, column)
    table = read_table(runs, *names.values(), where=where)
    points = score_forecast(file, table, columns=names, loss=loss)
    print(points.to_string(index=False))
    points.to_csv(out.with_suffix(".csv"), index=False)
    finish(out, runs, {"points": points.to_dict(orient="records")}, [])


def design(
    runs: RunsFile,
    target: Annotated[float, typer.Option(help="FLOPs of the run whose loss is to be known")],
    keys: Annotated[str, typer.Option(help="keys that make a shape: model.width,model.depth")],
    budget: Annotated[float | None, typer.Option(help="FLOPs to spend")] = None,
    gpu_hours: Annotated[
        float | None, typer.Option(help="instead of --budget, with --rate")
    ] = None,
    rate: Annotated[float, typer.Option(help="FLOP/s that a GPU reaches in training")] = 4e14,
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
        raise typer.BadParameter("give one of --budget and --gpu-hours")
    flops = budget if budget is not None else float(gpu_hours or 0.0) * 3600 * rate
    table, names = read_table(runs, n, d, where=where), keys.split(",")
    columns = {"n": n, "d": d}
    fitted = fit(table, CHINCHILLA, columns=columns, loss=loss, bootstraps=bootstrap, seed=seed)
    choices = pd.read_csv(shapes) if shapes else table.assign(n=table[n])
    require(choices, ["n", *names])
    choices = choices[["n", *names]].drop_duplicates()
    proposed = choose_runs(fitted, choices, budget=flops, target=target)
    print(proposed.runs.to_string(index=False))
    print(
        f"relative standard error of the loss at {target:.3g} FLOPs: {proposed.before:.2%} now, "
        f"{proposed.after:.2%} then"
    )
    out.write_text(as_sweep(proposed, name=name))
    finish(out.with_suffix(".json"), runs, proposed.report(), [])
    print(out)


def _point(text: str) -> dict[str, float]:
    """Return the run that "n=1e9,d=2e10" describes."""
    return {name: float(value) for name, value in map(split_pair, text.split(","))}
