"""Analysis of anyone's runs: `python -m analysis fit runs.csv ...`.

RUNS is a CSV or parquet file with a row for each run, or the folder sweeps/NAME of a sweep of ours.
A column may be an expression of others, in backticks where a name has spaces:
--d '`Training FLOP` / (6 * `Model Size`)'.
"""

import sys

import typer

from analysis.commands.chain import chain
from analysis.commands.comparison import ablate, table
from analysis.commands.compute_optimal import envelope, isoflop
from analysis.commands.law import fit
from analysis.commands.prediction import design, forecast, score
from analysis.pooling import warn_in_one_line

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, rich_markup_mode=None)
for _command in (fit, isoflop, envelope, forecast, score, chain, ablate, table, design):
    app.command()(_command)


def main() -> None:
    """Run a command; an error in its input is one line."""
    warn_in_one_line()
    try:
        app()
    except FileExistsError as error:
        sys.exit(f"{error.filename} exists: a forecast is not overwritten")
    except OSError as error:
        sys.exit(_line(f"{error.filename}: {error.strerror}" if error.filename else str(error)))
    except (KeyError, ValueError) as error:
        sys.exit(_line(str(error.args[0]) if isinstance(error, KeyError) else str(error)))


def _line(message: str) -> str:
    return " ".join(message.split())


if __name__ == "__main__":
    main()
