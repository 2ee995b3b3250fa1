"""The verbs of `espalier` that draw: plots, report, paper, look."""

import importlib.util
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from runner.commands.arguments import FIGURES, MODELS, Name, Reference, Root
from runner.commands.experiments import experiment_folder
from runner.machine.errors import ConfigError
from runner.machine.text_files import read_text

if TYPE_CHECKING:
    from analysis.outputs import Outputs
    from analysis.runs import Runs

app = typer.Typer()
_WIDTH_IN_VIEWS = 640  # pixels: MLflow cuts off what is wider than its page
Experiment = Annotated[
    str | None,
    typer.Option(
        "--experiment",
        help="Folder of figures.py and README.md, by name or path; default: the sweep's name.",
    ),
]


@app.command(rich_help_panel=FIGURES)
def plots(
    name: Name,
    root: Root = Path("."),
    out: Annotated[Path | None, typer.Option(help="Folder; default: plots/NAME.")] = None,
    where: Annotated[str | None, typer.Option(help="Cells to draw: 'seed < 3'.")] = None,
    experiment: Experiment = None,
    publish: Annotated[
        bool,
        typer.Option(
            "--publish", help="Also copy figures and tables into the experiment's folder."
        ),
    ] = False,
) -> None:
    """Draw the figures of a sweep by its experiment's figures.py, or else default figures.

    A figures.py writes to figures/ and beside it, as in the experiment's own folder.
    """
    from analysis.pooling import warn_in_one_line  # noqa: PLC0415
    from analysis.runs import from_folders  # noqa: PLC0415
    from runner.records.cells import members  # noqa: PLC0415

    warn_in_one_line()
    members(root, name)  # refuses a name that is no sweep's
    home = experiment_folder(experiment or name)
    script = home / "figures.py"
    if publish and not script.exists():
        raise ConfigError(f"--publish needs {script}, which does not exist")
    with _refusals(script):
        outputs = _outputs(out or root / "plots" / name, "espalier plots")
        outputs.check([])
        runs = _chosen(from_folders(root, name), where)
        with outputs.staged({"sweep": name, "where": where}) as staged:
            drawn = _draw(runs, script, staged)
        made = outputs.made()
        if publish:
            for file in made:
                copy = home / file.relative_to(outputs.folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
    for path in drawn:
        typer.echo(outputs.folder / path.relative_to(staged))
    if publish:
        typer.echo(f"published: {len(made)} files in {home}")
    _tell(name, root, home)


@app.command(rich_help_panel=FIGURES)
def report(
    name: Name,
    root: Root = Path("."),
    out: Annotated[Path | None, typer.Option(help="Default: sweeps/NAME/report.html.")] = None,
    mlflow: Annotated[
        str, typer.Option(help="Address of the MLflow UI that links lead to.")
    ] = "http://127.0.0.1:5000",
    experiment: Experiment = None,
) -> None:
    """Write a self-contained HTML page: verdict, figures, results, cells, curves, failures."""
    from analysis.outputs import check_folder  # noqa: PLC0415
    from analysis.readme import story  # noqa: PLC0415
    from runner.records.sweep_cells import sweep_rows  # noqa: PLC0415
    from runner.views.report import is_status_page, write_status_page  # noqa: PLC0415

    file = out or root / "sweeps" / name / "report.html"
    if out is not None and out.exists() and not is_status_page(out):
        raise ConfigError(f"{out} exists and is no report; choose another --out")
    rows = sweep_rows(root, name)
    with _refusals():
        check_folder(file.parent)
        figures, results = _drawn(name, root, ".png")
        home = experiment_folder(experiment or name)
        verdict = story(home / "README.md")
        write_status_page(rows, name, file, mlflow, figures, verdict, results)
    _tell(name, root, home)
    typer.echo(file)


@app.command(rich_help_panel=FIGURES)
def paper(
    name: Name,
    root: Root = Path("."),
    out: Annotated[Path | None, typer.Option(help="Folder; default: papers/NAME.")] = None,
    experiment: Experiment = None,
) -> None:
    """Write an experiment's figures, tables and numbers as a folder with a main .tex file."""
    from analysis.paper import provenance, write_paper  # noqa: PLC0415
    from analysis.runs import from_folders  # noqa: PLC0415

    runs = from_folders(root, name)
    figures, results = _drawn(name, root, ".pdf")
    if not figures:
        raise ConfigError(f"no figures of {name} yet: run `espalier plots {name}` first")
    facts = {"sweep": name, "command": f"espalier paper {name}"} | provenance(root, runs)
    with _refusals():
        main_tex = write_paper(
            runs,
            name,
            out or root / "papers" / name,
            figures=figures,
            results=results,
            readme=experiment_folder(experiment or name) / "README.md",
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
    outputs = _outputs(out or root / "looks" / cell.fingerprint, "espalier look")
    with _refusals():
        outputs.check([])
    internals = look_at(cell, read_text(file) if file is not None else text or "")
    title = f"{cell.config.name} {cell.fingerprint[:8]}"
    with _refusals(), outputs.staged({"run": cell.fingerprint}) as staged:
        drawn = draw(internals, staged, title)
    for path in drawn:
        typer.echo(outputs.folder / path.relative_to(staged))


@app.command(rich_help_panel=MODELS)
def order(
    run: Reference,
    prompt: Annotated[str, typer.Option(help="The text that the canvas follows.")] = "\n",
    tokens: Annotated[int | None, typer.Option(help="Length of the canvas.")] = None,
    steps: Annotated[int | None, typer.Option(help="Forward passes.")] = None,
    algorithm: Annotated[str, typer.Option(help="What is revealed first.")] = "entropy",
    block: Annotated[int | None, typer.Option(help="Tokens at a time, left to right.")] = None,
    temperature: Annotated[float, typer.Option(help="Divides the logits; 0 is greedy.")] = 0.1,
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="Folder; default: looks/RUN.")] = None,
    root: Root = Path("."),
) -> None:
    """Show a masked-diffusion model write a text, in its order: a page, a picture, statistics."""
    from analysis.reveal_order import draw_order  # noqa: PLC0415
    from runner.commands.generation_cli import PromptCompleter  # noqa: PLC0415
    from runner.data.corpus import texts_of  # noqa: PLC0415
    from runner.records.cells import find_cell  # noqa: PLC0415

    cell = find_cell(root, run)
    completer = PromptCompleter(
        cell.folder,
        max_new_tokens=tokens,
        algorithm=algorithm,
        steps=steps,
        block=block,
        temperature=temperature,
        seed=seed,
        ends=(),
    )
    ((_, done),) = completer.complete([prompt])
    outputs = _outputs(out or root / "looks" / cell.fingerprint, "espalier order")
    with _refusals():
        outputs.check([])
    title = f"{cell.config.name} {cell.fingerprint[:8]}"
    texts = texts_of(completer.generator.tokenizer, done.ids)
    with _refusals(), outputs.staged({"run": cell.fingerprint}) as staged:
        drawn = draw_order(texts, done.revealed_at, staged, title, prompt)
    for path in drawn:
        typer.echo(outputs.folder / path.relative_to(staged))


def _chosen(runs: "Runs", where: str | None) -> "Runs":
    """Return the runs for which `where` is true, with a note of it; all if it is None."""
    from analysis.expressions import true_rows  # noqa: PLC0415

    if where is None:
        return runs
    chosen = runs.table[true_rows(runs.table, where, "--where")]
    if chosen.empty:
        raise ConfigError(f"--where {where!r} leaves none of {len(runs.table)} cells")
    return replace(runs, table=chosen, notes=(*runs.notes, f"only {where}"))


def _draw(runs: "Runs", script: Path, folder: Path) -> list[Path]:
    """Return the figures after writing them, and what a figures.py writes besides, to `folder`."""
    from analysis.defaults import default_figures  # noqa: PLC0415

    if not script.exists():
        typer.echo(f"default figures, as there is no {script}")
        return default_figures(runs, folder)
    typer.echo(f"figures of {script}")
    spec = importlib.util.spec_from_file_location("figures", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: list[Path] = module.main(runs, folder / "figures")
    return made


def _outputs(folder: Path, command: str) -> "Outputs":
    from analysis.outputs import Outputs  # noqa: PLC0415

    return Outputs(folder / "made.json", command)


def _drawn(name: str, root: Path, kind: str) -> tuple[list[Path], Path | None]:
    """Return the figures of `kind` (".png") and the results.csv that `plots` has made last."""
    files = _outputs(root / "plots" / name, "espalier plots").made()
    results = [file for file in files if file.name == "results.csv"]
    return [file for file in files if file.suffix == kind], results[0] if results else None


def _tell(name: str, root: Path, home: Path) -> None:
    """Note for other views what the experiment in `home` says of a sweep, and its first figure."""
    from PIL import Image  # noqa: PLC0415

    from analysis.readme import story  # noqa: PLC0415
    from runner.views.report_sections import by_question  # noqa: PLC0415
    from runner.views.sweep_story import figure_file, note_story  # noqa: PLC0415

    note_story(root, name, story(home / "README.md"))
    for figure in by_question(_drawn(name, root, ".png")[0])[:1]:
        with Image.open(figure) as image:
            image.thumbnail((_WIDTH_IN_VIEWS, _WIDTH_IN_VIEWS))
            image.save(figure_file(root, name))


@contextmanager
def _refusals(script: Path | None = None) -> Iterator[None]:
    """Turn what analysis refuses into one line, with the line of `script` that asked for it."""
    try:
        yield
    except (KeyError, ValueError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if script and Path(frame.filename) == script]
        asked = f"{script}, line {lines[-1]}: " if lines else ""
        named = f"no {error.args[0]!r}" if type(error) is KeyError and asked else error.args[0]
        raise ConfigError(f"{asked}{named}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise ConfigError(str(error)) from error  # a sweep that does not exist
