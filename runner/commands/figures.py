"""The verbs of `espalier` that draw: plots, report, paper, look. The only imports of analysis."""

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from runner.commands.arguments import FIGURES, MODELS, Name, Reference, Root, experiment_folder
from runner.machine.errors import ConfigError
from runner.machine.text_files import read_text

app = typer.Typer()


@app.command(rich_help_panel=FIGURES)
def plots(
    name: Name,
    root: Root = Path("."),
    out: Annotated[
        Path | None, typer.Option(help="Folder; default: the experiment's, or plots/NAME.")
    ] = None,
) -> None:
    """Draw the figures of a sweep by its experiment's figures.py, or else default figures."""
    from analysis.runs import from_folders  # noqa: PLC0415

    runs = from_folders(root, name)
    script = experiment_folder(name) / "figures.py"
    if script.exists():
        typer.echo(f"figures of {script}")
        spec = importlib.util.spec_from_file_location("figures", script)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        made = module.main(runs, out) if out else module.main(runs)
    else:
        from analysis.defaults import default_figures  # noqa: PLC0415

        typer.echo(f"{script} does not exist: default figures")
        made = default_figures(runs, out or root / "plots" / name)
    for path in made:
        typer.echo(path)


@app.command(rich_help_panel=FIGURES)
def report(
    name: Name,
    root: Root = Path("."),
    out: Annotated[Path | None, typer.Option(help="Default: sweeps/NAME/report.html.")] = None,
    mlflow: Annotated[
        str, typer.Option(help="Address of the MLflow UI that links lead to.")
    ] = "http://127.0.0.1:5000",
) -> None:
    """Write a self-contained HTML page: verdict, figures, results, cells, curves, failures."""
    from analysis.readme import story  # noqa: PLC0415
    from runner.records.cells import sweep_rows  # noqa: PLC0415
    from runner.views.report import write_status_page  # noqa: PLC0415

    file, folder = out or root / "sweeps" / name / "report.html", experiment_folder(name)
    figures = _drawn_figures(name, root, "png")
    verdict, results = story(folder / "README.md"), folder / "results.csv"
    write_status_page(sweep_rows(root, name), name, file, mlflow, figures, verdict, results)
    typer.echo(file)


@app.command(rich_help_panel=FIGURES)
def paper(
    name: Name,
    root: Root = Path("."),
    out: Annotated[Path | None, typer.Option(help="Folder; default: papers/NAME.")] = None,
) -> None:
    """Write an experiment's figures, tables and numbers as a folder with a main .tex file."""
    from analysis.paper import provenance, write_paper  # noqa: PLC0415
    from analysis.runs import from_folders  # noqa: PLC0415

    runs, folder = from_folders(root, name), experiment_folder(name)
    figures = _drawn_figures(name, root, "pdf")
    if not figures:
        raise ConfigError(f"no figures of {name} yet: run `espalier plots {name}` first")
    facts = {"sweep": name, "command": f"espalier paper {name}"} | provenance(root, runs)
    main_tex = write_paper(
        runs,
        name,
        out or root / "papers" / name,
        figures=figures,
        results=folder / "results.csv",
        readme=folder / "README.md",
        provenance=facts,
    )
    typer.echo(f"{main_tex}: latexmk -pdf -cd {main_tex}")


@app.command(rich_help_panel=MODELS)
def look(
    run: Reference,
    text: Annotated[str | None, typer.Option(help="The text to run through the model.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(exists=True, help="... or a file of text, truncated to the context."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default: looks/RUN.")] = None,
    root: Root = Path("."),
) -> None:
    """Draw a trained cell's attention maps, logit lens and token losses for one text."""
    from analysis.internals import draw  # noqa: PLC0415
    from runner.evaluate.internals import look_at  # noqa: PLC0415
    from runner.records.cells import find_cell  # noqa: PLC0415

    if (text is None) == (file is None):
        raise ConfigError("give either --text or --file")
    cell = find_cell(root, run)
    internals = look_at(cell, read_text(file) if file is not None else text or "")
    folder = out or root / "looks" / cell.fingerprint
    for path in draw(internals, folder, f"{cell.config.name} {cell.fingerprint[:8]}"):
        typer.echo(path)


def _drawn_figures(name: str, root: Path, kind: str) -> list[Path]:
    """Return the files drawn by `plots`: the experiment's own figures, or else the default ones."""
    own = sorted((experiment_folder(name) / "figures").glob(f"*.{kind}"))
    return own or sorted((root / "plots" / name).glob(f"*.{kind}"))
