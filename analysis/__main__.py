"""Analysis of anyone's runs: `python -m analysis fit runs.csv ...`.

RUNS is a CSV or parquet file with a row for each run, or the folder sweeps/NAME of a sweep of ours. A column may
be an expression of others, in backticks where a name has spaces: --d '`Training FLOP` / (6 * `Model Size`)'.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from rich.console import Console

from analysis import law_plots, plots
from analysis.errors import require
from analysis.fit import fit as fit_law
from analysis.laws import LAWS, Law
from analysis.paired import paired_difference
from analysis.report import write_report
from analysis.runs import from_folders

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, rich_markup_mode=None)
RunsFile = Annotated[
    Path, typer.Argument(exists=True, metavar="RUNS", help="CSV, parquet or sweeps/NAME")
]
LawName = Annotated[str, typer.Option(help=f"one of {', '.join(LAWS)}, or FILE.py:NAME")]
N = Annotated[str, typer.Option(help="column of the parameters")]
D = Annotated[str, typer.Option(help="column of the tokens")]
X = Annotated[str, typer.Option(help="column of the size, for laws of one")]
Column = Annotated[
    list[str] | None, typer.Option(help="another column of the law, unique=unique_tokens")
]
Loss = Annotated[str, typer.Option(help="column of the loss, or of what the law is of")]
Holdout = Annotated[str | None, typer.Option(help="rows to predict, not to fit: 'flops > 1e21'")]
Delta = Annotated[float, typer.Option(help="Huber's, in log loss")]
Bootstrap = Annotated[int, typer.Option(help="resamples")]
Where = Annotated[str | None, typer.Option(help="rows to use at all: 'loss < 3.9'")]
Seed = Annotated[int, typer.Option(help="of the resamples")]
Metric = Annotated[str, typer.Option(help="column that is compared")]


@app.command()
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
    """Fit a scaling law; print parameters, intervals and how far to trust them; write figures and report."""
    from analysis.fit_console import tell_fit  # noqa: PLC0415
    from analysis.robustness import flat_valleys, profiles, sensitivity  # noqa: PLC0415

    names = _names(n, d, x, column)
    table = _read(runs, *names.values(), *(also_n or []), where=where)
    found = fit_law(
        table,
        _law(law),
        columns=names,
        loss=loss,
        holdout=holdout,
        delta=delta,
        bootstraps=bootstrap,
        seed=seed,
    )
    body, made, note = found.report(), [], found.counts()
    figure, data = law_plots.law_with_residuals(
        found.residuals(), title=f"{found.law.name}: fitted against measured"
    )
    made.append(plots.save(out.parent, out.stem, figure, data, note))
    if bootstrap > 1:
        figure, data = law_plots.pair_plot(
            found, title=f"{bootstrap} bootstraps of {found.law.name}"
        )
        made.append(plots.save(out.parent, f"{out.stem}_pairs", figure, data, note))
    if check:
        curves = profiles(found)
        body["profiles"] = flat_valleys(curves).to_dict(orient="records")
        body["sensitivity"] = sensitivity(
            table, found, columns=names, loss=loss, also_n=also_n, holdout=holdout
        ).to_dict(orient="records")
        figure, data = law_plots.profile_curves(
            curves, title="What the data allow, one parameter fixed at a time"
        )
        made.append(plots.save(out.parent, f"{out.stem}_profiles", figure, data, note))
        if found.law.name == "chinchilla":
            from analysis.projection import variable_projection  # noqa: PLC0415

            columns = (found.used[c].to_numpy() for c in ("n", "d", "loss"))
            body["variable_projection"] = variable_projection(
                *columns, bootstraps=100, seed=seed
            ).to_dict(orient="records")
    budgets = {f"{budget:g}": found.compute_optimal(budget) for budget in flops or []}
    body["compute_optimal"] = {k: v.to_dict(orient="records") for k, v in budgets.items()}
    tell_fit(Console(), found, body, budgets)
    _end(out, runs, body, made)


@app.command()
def isoflop(
    runs: RunsFile,
    flops: Annotated[str, typer.Option(help="column of the training FLOPs")] = "flops",
    n: N = "num_parameters",
    loss: Loss = "val_loss",
    d: Annotated[str | None, typer.Option(help="column of the tokens; default: flops / 6n")] = None,
    where: Where = None,
    method: Annotated[str, typer.Option(help="parabola or akima")] = "parabola",
    bootstrap: Bootstrap = 1000,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="JSON; figures and CSVs go beside it")] = Path(
        "isoflop.json"
    ),
) -> None:
    """Find the best size at each budget and how it grows with compute (approach 2)."""
    from analysis.isoflop import METHODS  # noqa: PLC0415
    from analysis.isoflop import isoflop as find  # noqa: PLC0415

    if method not in METHODS:
        raise typer.BadParameter(f"{method} is none of {', '.join(METHODS)}", param_hint="--method")
    found = find(
        _read(runs, flops, n, loss, *([d] if d else []), where=where),
        flops=flops,
        n=n,
        loss=loss,
        tokens=d,
        method=method,  # type: ignore[arg-type]
        bootstraps=bootstrap,
        seed=seed,
    )
    print(found.budgets.to_string(index=False), end="\n\n")
    print(found.exponents.to_string(index=False))
    note = found.counts()
    print(note)
    row = found.exponents.set_index("quantity").loc["n"]
    figure, data = law_plots.isoflop_curves(
        found, title=f"Best size grows as C^{row['exponent']:.2f}"
    )
    made = [plots.save(out.parent, out.stem, figure, data, note)]
    figure, data = law_plots.best_size(found, title="Compute-optimal size, isoFLOP minima")
    made.append(plots.save(out.parent, f"{out.stem}_best", figure, data, note))
    _end(out, runs, found.report(), made)


@app.command()
def envelope(
    curves: Annotated[
        Path,
        typer.Argument(
            exists=True, metavar="CURVES", help="CSV or parquet, a row for each logged point"
        ),
    ],
    run: Annotated[str, typer.Option(help="column that names the run")] = "fingerprint",
    n: N = "num_parameters",
    flops: Annotated[str, typer.Option(help="column of the FLOPs so far")] = "flops",
    loss: Loss = "loss",
    width: Annotated[float, typer.Option(help="of the smoothing, in natural log of FLOPs")] = 0.1,
    out: Annotated[Path, typer.Option(help="JSON; figures and CSVs go beside it")] = Path(
        "envelope.json"
    ),
) -> None:
    """Find which size has the smallest loss after each number of FLOPs (approach 1)."""
    from analysis.envelope import envelope as find  # noqa: PLC0415

    found = find(_read(curves), run=run, n=n, flops=flops, loss=loss, width=width)
    print(found.exponents.to_string(index=False))
    note = f"{found.curves['run'].nunique()} runs; {found.unused:.0%} of the envelope lies at the smallest or largest size"
    print(note)
    figure, data = law_plots.best_size(found, title="Compute-optimal size, lower envelope")
    _end(out, curves, found.report(), [plots.save(out.parent, out.stem, figure, data, note)])


@app.command()
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
    """Predict runs that have not been made and write the prediction down, with the time and its input."""
    from analysis.forecast import write_forecast  # noqa: PLC0415
    from analysis.report import origin  # noqa: PLC0415

    names = _names(n, d, x, column)
    found = fit_law(
        _read(runs, *names.values(), where=where),
        _law(law),
        columns=names,
        loss=loss,
        holdout=holdout,
        delta=delta,
        bootstraps=bootstrap,
        seed=seed,
    )
    points = pd.DataFrame([_point(text) for text in at])
    print(write_forecast(found, points, out, **origin(runs)).to_string(index=False))
    print(f"{found.counts()}\n{out}")


@app.command()
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
    from analysis.forecast import score as compare  # noqa: PLC0415

    names = _names(n, d, x, column)
    found = compare(file, _read(runs, *names.values(), where=where), columns=names, loss=loss)
    print(found.to_string(index=False))
    found.to_csv(out.with_suffix(".csv"), index=False)
    _end(out, runs, {"points": found.to_dict(orient="records")}, [])


@app.command()
def ablate(
    runs: RunsFile,
    baseline: Annotated[str, typer.Option(help="column=value, precision=bf16")],
    pair: Annotated[
        str, typer.Option(help="columns in which two runs agree to be compared")
    ] = "seed",
    metric: Metric = "val_loss",
    out: Annotated[Path, typer.Option(help="JSON; figure and CSV go beside it")] = Path(
        "ablation.json"
    ),
) -> None:
    """Compare each value of a column with a baseline, paired; print differences, intervals and tests."""
    key, equals, value = baseline.partition("=")
    if not equals:
        raise typer.BadParameter(f"{baseline} must be column=value", param_hint="--baseline")
    table = _read(runs)
    require(table, [key])
    table[key] = table[key].astype(str)
    gap = paired_difference(table, key=key, baseline=value, metric=metric, pair=pair.split(","))
    print(gap.to_string(index=False))
    note = f"{len(table)} runs, {int(table[metric].isna().sum())} without {metric}"
    print(note)
    figure, data = plots.forest(gap, baseline=value, metric=metric)
    made = [plots.save(out.parent, out.stem, figure, data, note)]
    _end(
        out,
        runs,
        {"metric": metric, "baseline": baseline, "differences": gap.to_dict(orient="records")},
        made,
    )


@app.command()
def table(
    runs: RunsFile,
    rows: Annotated[str, typer.Option(help="column whose values are the rows")],
    cols: Annotated[str | None, typer.Option(help="column whose values are the columns")] = None,
    metric: Metric = "val_loss",
    latex: Annotated[bool, typer.Option(help="print LaTeX (booktabs)")] = False,
    caption: Annotated[str, typer.Option(help="of the LaTeX table")] = "",
    out: Annotated[Path, typer.Option(help="JSON; a .csv and a .tex go beside it")] = Path(
        "table.json"
    ),
) -> None:
    """Tabulate mean +- standard deviation (number of runs); holes of the grid are shown."""
    from analysis.tables import cross_table  # noqa: PLC0415
    from analysis.tables import latex as as_latex  # noqa: PLC0415

    read = _read(runs)
    found = cross_table(read, rows=rows, columns=cols, metric=metric)
    holes, lost = int((found == "--").sum().sum()), int(read[metric].isna().sum())
    note = f"{found.size} cells, {holes} without a run; {len(read)} runs, {lost} without {metric}"
    text = as_latex(
        found, caption=caption or f"{metric}: mean +- s.d. (runs)", label=out.stem, note=note
    )
    print(text if latex else found.to_string(), end="" if latex else "\n")
    print(("% " if latex else "") + note)
    out.with_suffix(".tex").write_text(text)
    found.to_csv(out.with_suffix(".csv"))
    _end(
        out,
        runs,
        {"metric": metric, "cells": found.reset_index().to_dict(orient="records"), "note": note},
        [],
        quiet=latex,
    )


@app.command()
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
    """Propose the runs that most reduce the uncertainty of a prediction, as a sweep ready to run."""
    from analysis.design import as_sweep  # noqa: PLC0415
    from analysis.design import design as choose  # noqa: PLC0415

    if (budget is None) == (gpu_hours is None):
        raise typer.BadParameter("give one of --budget and --gpu-hours")
    flops = budget if budget is not None else float(gpu_hours or 0.0) * 3600 * rate
    read, names = _read(runs, n, d, where=where), keys.split(",")
    found = fit_law(
        read,
        LAWS["chinchilla"],
        columns={"n": n, "d": d},
        loss=loss,
        bootstraps=bootstrap,
        seed=seed,
    )
    known = pd.read_csv(shapes) if shapes else read.assign(n=read[n])
    require(known, ["n", *names])
    proposed = choose(found, known[["n", *names]].drop_duplicates(), budget=flops, target=target)
    print(proposed.runs.to_string(index=False))
    print(
        f"relative standard error of the loss at {target:.3g} FLOPs: {proposed.before:.2%} now, {proposed.after:.2%} then"
    )
    out.write_text(as_sweep(proposed, name=name))
    _end(out.with_suffix(".json"), runs, proposed.report(), [])
    print(out)


def _read(file: Path, *columns: str, where: str | None = None) -> pd.DataFrame:
    """Return the table with those of `columns` that are expressions, and the rows for which `where` holds."""
    if file.is_dir():
        runs = from_folders(file.parent.parent, file.name)
        print(runs.count())
        table = runs.finished.copy()
    else:
        table = pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file)
    for column in columns:
        if column not in table and any(sign in column for sign in "+-*/"):
            table[column] = table.eval(column)
    if where:
        kept = table.query(where)
        print(f"--where {where!r} leaves {len(kept)} of {len(table)} rows")
        table = kept.copy()
    return table


def _law(name: str) -> Law:
    if name in LAWS:
        return LAWS[name]
    file, colon, attribute = name.rpartition(":")
    if not colon:
        raise typer.BadParameter(
            f"{name} is none of {', '.join(LAWS)}; your own is FILE.py:NAME", param_hint="--law"
        )
    spec = importlib.util.spec_from_file_location("law", file)
    if spec is None or spec.loader is None or not Path(file).exists():
        raise typer.BadParameter(f"{file} is no Python file", param_hint="--law")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, attribute, None)
    if not isinstance(found, Law):
        raise typer.BadParameter(f"{attribute} of {file} is no Law", param_hint="--law")
    return found


def _names(n: str, d: str, x: str, more: list[str] | None) -> dict[str, str]:
    return {"n": n, "d": d, "x": x} | dict(_pair(text) for text in more or [])


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text} must be name=value")
    return name, value


def _point(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in map(_pair, text.split(","))}


def _end(
    out: Path, source: Path, body: dict[str, object], made: list[Path], quiet: bool = False
) -> None:
    write_report(out, source, body)
    if not quiet:
        print(*[out, *made], sep=", ")


def main() -> None:
    """Run; errors in the input are one line."""
    try:
        app()
    except (KeyError, ValueError, FileExistsError) as error:
        sys.exit(
            str(error.args[0])
            if not isinstance(error, OSError)
            else f"{error.filename} exists: a forecast is not overwritten"
        )


if __name__ == "__main__":
    main()
