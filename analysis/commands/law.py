"""The command that fits a scaling law."""

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from rich.console import Console

from analysis import law_plots, plots
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
)
from analysis.fit import Fit
from analysis.fit import fit as fit_law
from analysis.fit_console import print_fit
from analysis.projection import variable_projection
from analysis.robustness import flat_valleys, profiles, sensitivity


def fit(
    runs: RunsFile,
    law: LawName = "chinchilla",
    n: N = "num_parameters",
    d: D = "tokens",
    x: X = "flops",
    column: Column = None,
    loss: Loss = "val_loss",
    where: Where = None,
    holdout: Holdout = None,
    delta: Delta = 1e-3,
    bootstrap: Bootstrap = 4000,
    seed: Seed = 0,
    flops: Annotated[
        list[float] | None, typer.Option(help="budgets to find the best n and d for")
    ] = None,
    also_n: Annotated[
        list[str] | None, typer.Option(help="other counts of the parameters, for the sensitivity")
    ] = None,
    check: Annotated[bool, typer.Option(help="profiles, sensitivity and a second method")] = True,
    out: Annotated[Path, typer.Option(help="JSON; figures and CSVs go beside it")] = Path(
        "fit.json"
    ),
) -> None:
    """Fit a scaling law: parameters, intervals, how far to trust them; figures and a report."""
    names = column_names(n, d, x, column)
    table = read_table(runs, *names.values(), *(also_n or []), where=where)
    fitted = fit_law(
        table,
        find_law(law),
        columns=names,
        loss=loss,
        holdout=holdout,
        delta=delta,
        bootstraps=bootstrap,
        seed=seed,
    )
    body, figures = fitted.report(), _figures(fitted, out)
    if check:
        curves = profiles(fitted)
        figure, data = law_plots.profile_curves(
            curves, title="What the data allow, one parameter fixed at a time"
        )
        figures.append(
            plots.save(out.parent, f"{out.stem}_profiles", figure, data, fitted.counts())
        )
        choices = sensitivity(
            table, fitted, columns=names, loss=loss, also_n=also_n, holdout=holdout
        )
        body["profiles"] = flat_valleys(curves).to_dict(orient="records")
        body["sensitivity"] = choices.to_dict(orient="records")
        body |= _second_method(fitted, seed)
    budgets = {f"{budget:g}": fitted.compute_optimal(budget) for budget in flops or []}
    body["compute_optimal"] = {k: v.to_dict(orient="records") for k, v in budgets.items()}
    print_fit(Console(), fitted, body, budgets)
    finish(out, runs, body, figures)


def _figures(fitted: Fit, out: Path) -> list[Path]:
    """Draw the law with its residuals and, where there are bootstraps, its parameters in pairs."""
    name, drawn = fitted.law.name, []
    figure, data = law_plots.law_with_residuals(
        fitted.residuals(), title=f"{name}: fitted against measured"
    )
    drawn.append((out.stem, figure, data))
    if len(fitted.draws) > 1:
        figure, data = law_plots.pair_plot(
            fitted, title=f"{len(fitted.draws)} bootstraps of {name}"
        )
        drawn.append((f"{out.stem}_pairs", figure, data))
    return [plots.save(out.parent, *parts, fitted.counts()) for parts in drawn]


def _second_method(fitted: Fit, seed: int) -> dict[str, Any]:
    """Return the parameters by variable projection, {} where the law is not Chinchilla's."""
    if fitted.law.name != "chinchilla":
        return {}
    points = (fitted.used[name].to_numpy() for name in ("n", "d", "loss"))
    parameters: pd.DataFrame = variable_projection(*points, bootstraps=100, seed=seed)
    return {"variable_projection": parameters.to_dict(orient="records")}
