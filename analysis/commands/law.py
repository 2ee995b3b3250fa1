"""The command that fits a scaling law."""

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from rich.console import Console

from analysis import law_plots
from analysis.commands.options import (
    Bootstrap,
    Cluster,
    Column,
    D,
    Delta,
    Drawing,
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
    finish,
    law_file,
    positive,
    progress_bar,
    read_table,
)
from analysis.fit import Fit
from analysis.fit import fit as fit_law
from analysis.fit_console import print_fit
from analysis.identification import extrapolation, missed_minimum, unidentified
from analysis.laws import CHINCHILLA
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
    fix: Fix = None,
    residuals: Residuals = "log",
    cluster: Cluster = None,
    delta: Delta = 1e-3,
    bootstrap: Bootstrap = 4000,
    seed: Seed = 0,
    flops: Annotated[
        list[float] | None,
        typer.Option(help="budgets to find the best n and d for", callback=positive),
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
    outputs = claim("fit", out, [runs, law_file(law)], ["", "_pairs", "_profiles"])
    found = find_law(law, fix, residuals)
    names = column_names(found.columns, n, d, x, column)
    source = read_table(runs, *names.values(), loss, *(also_n or []), where=where)
    with progress_bar() as progress:
        fitted = fit_law(
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
    body, drawings = fitted.report(), _drawings(fitted)
    budgets = {f"{budget:g}": fitted.compute_optimal(budget) for budget in flops or []}
    body["doubts"] = extrapolation(fitted, _sizes(budgets))
    if check:
        curves = profiles(fitted)
        figure, data = law_plots.profile_curves(
            curves, title="What the data allow, one parameter fixed at a time"
        )
        drawings.append(("_profiles", figure, data, fitted.counts()))
        choices = sensitivity(
            source.table, fitted, columns=names, loss=loss, also_n=also_n, holdout=holdout
        )
        allowed = flat_valleys(curves)
        body["profiles"] = allowed.to_dict(orient="records")
        body["doubts"] += unidentified(fitted, allowed) + missed_minimum(curves)
        body["sensitivity"] = choices.to_dict(orient="records")
        body |= _second_method(fitted)
    body["compute_optimal"] = {k: v.to_dict(orient="records") for k, v in budgets.items()}
    print_fit(Console(), fitted, body, budgets)
    finish(outputs, source, body, drawings)


def _sizes(budgets: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the compute-optimal n and d, a row for each budget."""
    best = [table.set_index("quantity")["estimate"] for table in budgets.values()]
    return pd.DataFrame(best, columns=["n", "d"])


def _drawings(fitted: Fit) -> list[Drawing]:
    """Draw the law with its residuals and, where there are bootstraps, its parameters in pairs."""
    name, note = fitted.law.name, fitted.counts()
    figure, data = law_plots.law_with_residuals(
        fitted.residuals(), title=f"{name}: fitted against measured"
    )
    drawings: list[Drawing] = [("", figure, data, note)]
    if len(fitted.draws) > 1:
        figure, data = law_plots.pair_plot(
            fitted, title=f"{len(fitted.draws)} bootstraps of {name}"
        )
        drawings.append(("_pairs", figure, data, note))
    return drawings


def _second_method(fitted: Fit) -> dict[str, Any]:
    """Return the parameters by variable projection, {} where the law is not Chinchilla's."""
    if fitted.law != CHINCHILLA:
        return {}
    points = (fitted.used[name].to_numpy() for name in ("n", "d", "loss"))
    parameters: pd.DataFrame = variable_projection(*points)
    return {"variable_projection": parameters.to_dict(orient="records")}
