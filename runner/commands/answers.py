"""The verbs that judge answers: score, errors."""

import json
from pathlib import Path
from typing import Annotated

import typer

from runner.commands.arguments import MODELS, Reference, Root
from runner.machine.text_files import as_text

app = typer.Typer()


@app.command(rich_help_panel=MODELS)
def score(
    run: Reference,
    problem: Annotated[str, typer.Option(help="What the answers are answers to.")],
    answer: Annotated[list[str], typer.Option(help="An answer; may be repeated.")],
    average: Annotated[bool, typer.Option(help="Take the averaged weights.")] = False,
    root: Root = Path("."),
) -> None:
    """Print how likely answers are right by a verifier, a line of JSON each.

    `score` is the probability after the last token, `steps` that after each line; of a verifier
    that judges steps, `least` and `product` are those of all of them together.
    """
    from runner.evaluate.answer_scorer import AnswerScorer  # noqa: PLC0415
    from runner.records.cells import find_cell  # noqa: PLC0415

    scorer = AnswerScorer(find_cell(root, run).folder, average=average)
    problem = as_text(problem, "--problem")
    texts = [as_text(one, "--answer") for one in answer]
    for text, found in zip(texts, scorer.score(problem, texts), strict=True):
        row = {"answer": text, "score": found.end, "steps": found.steps}
        if scorer.by_step:
            row |= {"least": found.least, "product": found.product}
        typer.echo(json.dumps(row, ensure_ascii=False))


@app.command(rich_help_panel=MODELS)
def errors(
    run: Reference,
    ambiguous: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="A wrong label less likely than this is ambiguous, not flipped."
        ),
    ] = 0.75,
    texts: Annotated[
        bool, typer.Option(help="Write prompts and answers; without, their lines and kinds alone.")
    ] = True,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the two files (default: the run's).")
    ] = None,
    root: Root = Path("."),
) -> None:
    """Sort the wrong answers of a run's evaluations by kind: errors.parquet and errors.html.

    The evaluations are those of eval.also that write answers: solving, labels, pairs.
    """
    from runner.records.cells import find_folder  # noqa: PLC0415
    from runner.views.wrong_answers import (  # noqa: PLC0415
        counts,
        write_page,
        write_table,
        wrong_answers,
    )

    folder = find_folder(root, run)
    found, totals = wrong_answers(folder, ambiguous=ambiguous, texts=texts)
    for name, kind, number, total in counts(found, totals):
        typer.echo(f"{name}: {number} of {total} ({100 * number / total:.1f}%) {kind}")
    for name, total in totals.items():
        right = total - sum(one.evaluation == name for one in found)
        typer.echo(f"{name}: {right} of {total} right")
    out = out or folder
    out.mkdir(parents=True, exist_ok=True)
    write_table(found, out / "errors.parquet")
    write_page(found, totals, folder.name, out / "errors.html")
    typer.echo(f"{out / 'errors.parquet'}, {out / 'errors.html'}")
