"""What the commands share: their options, the table that they read, the report that they write."""

import importlib.util
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from analysis.laws import LAWS, Law
from analysis.report import write_report
from analysis.runs import from_folders

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


def read_table(file: Path, *columns: str, where: str | None = None) -> pd.DataFrame:
    """Return the table in `file` (CSV, parquet) or of the finished runs of a sweep's folder.

    Args:
        columns: those that are expressions of others are computed and added.
        where: only the rows for which this expression is true.
    """
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
        chosen = table.query(where)
        print(f"--where {where!r} leaves {len(chosen)} of {len(table)} rows")
        table = chosen.copy()
    return table


def find_law(name: str) -> Law:
    """Return the law called `name`, or the one called NAME in FILE.py for FILE.py:NAME.

    Raises:
        typer.BadParameter: there is no such law, file or name.
    """
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
    law = getattr(module, attribute, None)
    if not isinstance(law, Law):
        raise typer.BadParameter(f"{attribute} of {file} is no Law", param_hint="--law")
    return law


def column_names(n: str, d: str, x: str, more: list[str] | None) -> dict[str, str]:
    """Return the table's names of a law's columns, those of --column (name=value) included."""
    return {"n": n, "d": d, "x": x} | dict(split_pair(text) for text in more or [])


def split_pair(text: str) -> tuple[str, str]:
    """Return (name, value) of "name=value".

    Raises:
        typer.BadParameter: there is no "=".
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text} must be name=value")
    return name, value


def finish(out: Path, source: Path, body: dict[str, object], figures: list[Path]) -> None:
    """Write the report to `out` and print the paths of all that was written."""
    write_report(out, source, body)
    print(*[out, *figures], sep=", ")
