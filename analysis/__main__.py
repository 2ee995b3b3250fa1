"""Analysis of anyone's runs: `python -m analysis fit runs.csv ...`; a table is a CSV with a row for each run."""

import sys
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from rich.console import Console
from rich.table import Table

from analysis import plots
from analysis.compare import paired_difference
from analysis.fit import Fit, write
from analysis.fit import fit as fit_law
from analysis.laws import LAWS

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
Csv = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="a CSV, a row for each run")]


@app.command()
def fit(
    runs: Csv,
    law: Annotated[str, typer.Option(help=f"one of {', '.join(LAWS)}")] = "chinchilla",
    n: Annotated[str, typer.Option(help="column of the parameters")] = "num_parameters",
    d: Annotated[str, typer.Option(help="column of the tokens")] = "tokens",
    x: Annotated[str, typer.Option(help="column of the size, for law power")] = "flops",
    loss: Annotated[str, typer.Option(help="column of the loss")] = "val_loss",
    holdout: Annotated[str | None, typer.Option(help="rows to predict, 'flops > 1e21'")] = None,
    delta: Annotated[float, typer.Option(help="Huber's, in log loss")] = 1e-3,
    bootstrap: Annotated[int, typer.Option(help="resamples")] = 4000,
    seed: Annotated[int, typer.Option(help="of the resamples")] = 0,
    flops: Annotated[list[float] | None, typer.Option(help="budgets to find the best n and d for")] = None,
    out: Annotated[Path, typer.Option(help="JSON; .pdf, .png and .csv go beside it")] = Path("fit.json"),
) -> None:  # fmt: skip
    """Fit a scaling law; print parameters, intervals and what was not used; write figure and report."""
    if law not in LAWS:
        raise typer.BadParameter(f"{law} is none of {', '.join(LAWS)}", param_hint="--law")
    table = pd.read_csv(runs)
    found = fit_law(
        table, LAWS[law], columns={"n": n, "d": d, "x": x}, loss=loss, holdout=holdout, delta=delta,
        bootstraps=bootstrap, seed=seed,
    )  # fmt: skip
    _print(found, flops or [])
    write(found, out, source=runs, command="python -m analysis " + " ".join(sys.argv[1:]))
    figure, data = plots.law_with_residuals(found.residuals(), title=f"{law}: fitted against measured")  # fmt: skip
    made = plots.save(out.parent, out.stem, figure, data, _counts(found))
    print(f"{out}, {made}")


@app.command()
def ablate(
    runs: Csv,
    baseline: Annotated[str, typer.Option(help="column=value, precision=bf16")],
    pair: Annotated[str, typer.Option(help="columns in which two runs agree to be compared")] = "seed",
    metric: Annotated[str, typer.Option(help="column that is compared")] = "val_loss",
    out: Annotated[Path, typer.Option(help="CSV; .pdf and .png go beside it")] = Path("ablation.csv"),
) -> None:  # fmt: skip
    """Compare each value of a column with a baseline, paired; print differences and intervals."""
    key, equals, value = baseline.partition("=")
    if not equals:
        raise typer.BadParameter(f"{baseline} must be column=value", param_hint="--baseline")
    table = pd.read_csv(runs, dtype={key: str})
    gap = paired_difference(table, key=key, baseline=value, metric=metric, pair=pair.split(","))
    print(gap.to_string(index=False))
    figure, data = plots.forest(gap, baseline=value, metric=metric)
    print(plots.save(out.parent, out.stem, figure, data, f"{len(table)} runs"))


def _counts(found: Fit) -> str:
    parts = [f"{len(found.used)} points fitted", f"{len(found.held_out)} held out"]
    parts += [f"{count} left out: {why}" for why, count in found.left_out.items()]
    return ", ".join(parts)


def _print(found: Fit, flops: list[float]) -> None:
    console, report = Console(), found.report()
    table = Table(box=None, pad_edge=False)
    for column in found.parameters.columns:
        table.add_column(column, justify="left" if column == "parameter" else "right")
    for row in found.parameters.itertuples(index=False):
        table.add_row(row[0], *(f"{value:.6g}" for value in row[1:]))
    console.print(table)
    basin = found.second_basin
    console.print(
        f"objective {found.objective:.10g}, reached by {found.in_best_basin:.0%} of {len(found.values)} starts; "
        + (f"next basin {basin:.4g}" if basin is not None else "no other basin")
    )
    console.print(_counts(found) + f"; rms residual of log loss {report['rms_residual']:.4f}")
    if report["held_out_error"]:
        console.print(f"held out: {report['held_out_error']['mean_relative']:+.2%} mean, {report['held_out_error']['worst_relative']:.2%} worst")  # fmt: skip
    for budget in flops:
        console.print(f"\nbest at {budget:.3g} FLOPs:\n{found.compute_optimal(budget).to_string(index=False)}")  # fmt: skip


def main() -> None:
    """Run; errors in the input are one line."""
    try:
        app()
    except (KeyError, ValueError) as error:
        sys.exit(str(error.args[0]))


if __name__ == "__main__":
    main()
