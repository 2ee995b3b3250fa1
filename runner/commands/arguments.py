"""Arguments that several verbs take."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from runner.commands.experiments import EXPERIMENTS
from runner.machine.errors import ConfigError

if TYPE_CHECKING:
    from runner.records.cells import Cell

# Groups of verbs in `espalier --help`, in order.
RUN, RUNS, FIGURES = "Run", "Look at runs", "Figures and pages"
MODELS, MLFLOW, DISK = "Trained models", "MLflow", "Disk"


def _root(given: Path) -> Path:
    for folder in (given, given / "runs", given / "sweeps"):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--root {given}: {folder} is not a folder; name another root")
    return given


Root = Annotated[
    Path, typer.Option(help="The folder of runs/, sweeps/ and mlflow/.", callback=_root)
]


def _name(given: str) -> str:
    from runner.records.names import check_name  # noqa: PLC0415

    return check_name("NAME", given)


def _names_of_sweeps(context: typer.Context, incomplete: str) -> list[str]:
    """Return what a sweep's name may become under --root, or where the command is given."""
    lists = Path(context.params.get("root") or ".").glob("sweeps/*/cells.jsonl")
    return sorted(f.parent.name for f in lists if f.parent.name.startswith(incomplete))


def _names_of_runs(context: typer.Context, incomplete: str) -> list[str]:
    """Return the fingerprints that `incomplete` may become."""
    folder = Path(context.params.get("root") or ".") / "runs"
    return sorted(f.name for f in folder.glob("*") if f.name.startswith(incomplete))


Name = Annotated[
    str,
    typer.Argument(help="The sweep's `name`.", callback=_name, autocompletion=_names_of_sweeps),
]
Reference = Annotated[
    str,
    typer.Argument(
        help="A run folder, the beginning of a fingerprint, or an MLflow run id.",
        autocompletion=_names_of_runs,
    ),
]


def _names_of_experiments(incomplete: str) -> list[str]:
    """Return what an experiment's name may become."""
    names = sorted(file.parent.name for file in EXPERIMENTS.glob("*/sweep.yaml"))
    return [name for name in names if name.startswith(incomplete)]


def _overrides(incomplete: str) -> list[str]:
    """Return what an override may become."""
    from runner.commands.completion import continuations  # noqa: PLC0415

    return continuations(incomplete)


Experiment = Annotated[
    str,
    typer.Argument(
        help="Folder under experiments/, or a path.", autocompletion=_names_of_experiments
    ),
]
Grid = Annotated[
    str | None,
    typer.Option(
        "--config-name",
        "-cn",
        help="Another grid of the folder, as quick, of quick.yaml (default: sweep).",
    ),
]
KvCache = Annotated[
    str | None,
    typer.Option(
        help="int8, fp8, nvfp4, int4, int2: keep keys and values in it (default: as computed)."
    ),
]
DraftWord = Annotated[
    str | None,
    typer.Option(
        help="What proposes tokens that the model checks together: a smaller run with the same "
        "tokenizer, lookup (the text so far), layers:N (its first layers), heads (of model=medusa)."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="KEY=VALUE, GROUP=CHOICE.", autocompletion=_overrides),
]


def chosen_cells(root: Path, name: str, prefixes: list[str] | None) -> "list[Cell]":
    """Return the cells of a sweep whose fingerprint begins with one of `prefixes`; all if None.

    Raises:
        ConfigError: there is none.
    """
    from runner.records.sweep_cells import sweep_cells  # noqa: PLC0415

    cells = sweep_cells(root, name)
    chosen = [c for c in cells if not prefixes or c.fingerprint.startswith(tuple(prefixes))]
    if not chosen:
        raise ConfigError(f"no cell of {name} begins with {' or '.join(prefixes or [])}")
    return chosen


def draft_folder(root: Path, draft: str | None) -> str | None:
    """Return what `TextGenerator` takes as draft: a run by its folder, another word as it is."""
    if draft is None or draft in ("lookup", "heads") or draft.startswith("layers:"):
        return draft
    from runner.records.cells import find_cell  # noqa: PLC0415

    return str(find_cell(root, draft).folder)
