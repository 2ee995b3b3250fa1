"""What the commands share: their options, the table that they read, the report that they write."""

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from analysis.errors import require
from analysis.law import Law
from analysis.laws import LAWS
from analysis.outputs import Outputs
from analysis.plots import save
from analysis.report import origin, plain
from analysis.resampling import Progress
from analysis.source import Source, read_source


def positive(option: typer.CallbackParam, value: Any) -> Any:
    """Return an option's value: None, a number or several, each finite and above 0.

    Raises:
        ValueError: one is not.
    """
    for number in value if isinstance(value, list) else [value]:
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"{option.opts[0]} {number:g} must be a finite number above 0")
    return value


def resamples(option: typer.CallbackParam, value: int) -> int:
    """Return a number of resamples, of which a spread needs two.

    Raises:
        ValueError: there are fewer.
    """
    if value < 2:
        raise ValueError(f"{option.opts[0]} {value} gives no interval: 2 or more, better 1000")
    return value


def seeded(option: typer.CallbackParam, value: int) -> int:
    """Return a seed, a number of 0 or more.

    Raises:
        ValueError: it is negative.
    """
    if value < 0:
        raise ValueError(f"{option.opts[0]} {value} must be 0 or more")
    return value


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
Fix = Annotated[
    list[str] | None, typer.Option(help="hold a parameter at a value: alpha=0.34; again for more")
]
Residuals = Annotated[str, typer.Option(help="differences of the log of the loss, or linear ones")]
Cluster = Annotated[
    str | None, typer.Option(help="column; rows of one of its values are resampled together")
]
Delta = Annotated[float, typer.Option(help="Huber's, in log loss", callback=positive)]
Bootstrap = Annotated[int, typer.Option(help="resamples", callback=resamples)]
Where = Annotated[str | None, typer.Option(help="rows to use at all: 'loss < 3.9'")]
Seed = Annotated[int, typer.Option(help="of the resamples", callback=seeded)]
Metric = Annotated[str, typer.Option(help="column that is compared")]
# What a command draws: the end of the file's name ("" for the first), the figure, what it shows,
# and the note under it.
Drawing = tuple[str, Figure, pd.DataFrame, str]


def read_table(file: Path, *columns: str, where: str | None = None) -> Source:
    """Return the table in `file` (CSV, parquet) or of the finished runs of a sweep's folder.

    Args:
        columns: those that must hold numbers; what is an expression of others is computed.
        where: only the rows for which this expression is true.
    """
    return read_source(file).where(where).with_numbers(*columns)


def read_curves(
    file: Path, *, run: str, n: str, flops: str, loss: str, where: str | None = None
) -> Source:
    """Return the table in `file`, or the curves of the finished runs of a sweep's folder.

    The curves have the columns `run`, `n`, `flops` and `loss`, a row for each logged loss.
    """
    source = read_source(file)
    if source.runs is not None:
        require(source.table, [run, n])
        facts = source.table[list(dict.fromkeys(["fingerprint", run, n]))]
        curves = source.runs.curves(loss, flops).rename(columns={"x": flops, "value": loss})
        source = replace(source, table=curves.merge(facts, on="fingerprint"))
    return source.where(where).with_numbers(n, flops, loss)


def find_law(name: str, fix: list[str] | None = None, residuals: str = "log") -> Law:
    """Return the law called `name`, or the one called NAME in FILE.py for FILE.py:NAME.

    Args:
        fix: parameters to hold, "alpha=0.34"; residuals: "log" (as the law says) or "linear".

    Raises:
        ValueError: there is no such law, file or name, no such residuals, or a parameter cannot be
            held so.
    """
    if residuals not in ("log", "linear"):
        raise ValueError(f"--residuals {residuals} is neither log nor linear")
    law = _named_law(name)
    law = law.linear() if residuals == "linear" else law
    return law.fix(dict(split_number(text) for text in fix or []))


def _named_law(name: str) -> Law:
    if name in LAWS:
        return LAWS[name]
    file, colon, attribute = name.rpartition(":")
    if not colon:
        raise ValueError(f"--law {name} is none of {', '.join(LAWS)}; your own is FILE.py:NAME")
    spec = importlib.util.spec_from_file_location("law", file)
    if spec is None or spec.loader is None or not Path(file).exists():
        raise ValueError(f"--law {name}: {file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    law = getattr(module, attribute, None)
    if not isinstance(law, Law):
        raise ValueError(f"--law {name}: {attribute} of {file} is no Law")
    return law


def law_file(name: str) -> Path | None:
    """Return FILE.py of a law of one's own, None of a published one."""
    return None if name in LAWS else Path(name.rpartition(":")[0] or name)


def column_names(
    columns: Sequence[str], n: str, d: str, x: str, more: list[str] | None
) -> dict[str, str]:
    """Return the table's names of a law's `columns`, those of --column (name=value) included.

    Raises:
        ValueError: --column names what is no column of the law.
    """
    given = dict(split_pair(text) for text in more or [])
    for name in given:
        if name not in columns:
            raise ValueError(
                f"--column {name}: the law has no such column; it has {', '.join(columns)}"
            )
    names = {"n": n, "d": d, "x": x} | given
    return {name: names.get(name, name) for name in columns}


def split_pair(text: str) -> tuple[str, str]:
    """Return (name, value) of "name=value".

    Raises:
        ValueError: there is no "=".
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text} must be name=value")
    return name, value


def split_number(text: str) -> tuple[str, float]:
    """Return (name, number) of "name=number".

    Raises:
        ValueError: there is no "=", or no number after it.
    """
    name, value = split_pair(text)
    try:
        return name, float(value)
    except ValueError:
        raise ValueError(f"{text} must be name=number") from None


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Yield what a fit tells its progress to; a bar on stderr, gone when the fit is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Bar(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def told(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield told


def claim(
    command: str,
    out: Path,
    inputs: Sequence[Path | None],
    drawings: Sequence[str] = (),
    texts: Sequence[str] = (),
) -> Outputs:
    """Return where the command writes, refused before it computes if it may not.

    Args:
        out: the report, JSON; inputs: every file that is read.
        drawings: the ends of the names of figures, "" and "_pairs"; texts: other files' suffixes.
    """
    made_by = f"python -m analysis {command}"
    outputs = Outputs(out, made_by, tuple(file for file in inputs if file))
    kinds = [f"{end}{kind}" for end in drawings for kind in (".png", ".pdf", ".csv")]
    outputs.check(f"{out.stem}{end}" for end in [*kinds, *texts])
    return outputs


def write(
    outputs: Outputs,
    source: Source,
    body: dict[str, Any],
    drawings: Sequence[Drawing] = (),
    texts: Mapping[str, str] | None = None,
) -> str:
    """Return the paths of what is written: figures, texts (by suffix) and the report.

    The report holds `body`, the origin of `source` and the hashes of the other files.
    """
    out, made = outputs.record, []
    with outputs.staged(plain({"schema": 1} | origin(source) | body)) as folder:
        for end, figure, data, note in drawings:
            made.append(save(folder, f"{out.stem}{end}", figure, data, note).name)
        for suffix, text in (texts or {}).items():
            (folder / f"{out.stem}{suffix}").write_text(text)
            made.append(f"{out.stem}{suffix}")
    return ", ".join(str(path) for path in [out, *(out.with_name(name) for name in made)])


def finish(
    outputs: Outputs, source: Source, body: dict[str, Any], drawings: Sequence[Drawing] = ()
) -> None:
    """Write a report and its figures, and print their paths."""
    print(write(outputs, source, body, drawings))
