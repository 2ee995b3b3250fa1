"""The verb of `espalier` that fills in middles: infill."""

from pathlib import Path
from typing import Annotated

import typer

from runner.commands.arguments import MODELS, Reference, Root
from runner.machine.errors import ConfigError

app = typer.Typer()


@app.command(rich_help_panel=MODELS)
def infill(
    run: Reference,
    prefix: Annotated[str, typer.Option(help="The text before.")] = "",
    suffix: Annotated[str, typer.Option(help="The text after.")] = "",
    tokens: Annotated[int, typer.Option(help="Masks to begin with.")] = 8,
    max_tokens: Annotated[
        int, typer.Option(help="Of a model that changes the length: the longest canvas.")
    ] = 64,
    expansions: Annotated[int, typer.Option(help="... and so often may one mask become two.")] = 64,
    temperature: Annotated[float, typer.Option(help="Divides the logits; 0 is greedy.")] = 0.2,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 0.9,
    algorithm: Annotated[str, typer.Option(help="What is revealed first.")] = "entropy",
    steps: Annotated[int | None, typer.Option(help="Forward passes (a fixed canvas).")] = None,
    n: Annotated[int, typer.Option(help="Middles: samples 0, 1, ... of SEED.")] = 1,
    whole: Annotated[
        bool, typer.Option("--whole", help="Print prefix and suffix around the middle too.")
    ] = False,
    average: Annotated[
        bool, typer.Option(help="Use the averaged weights (train.average).")
    ] = False,
    seed: int = 0,
    root: Root = Path("."),
) -> None:
    """Fill in the middle of a text by a masked-diffusion model."""
    from runner.commands.generation_cli import filling_in  # noqa: PLC0415
    from runner.generate.denoising import Denoising  # noqa: PLC0415
    from runner.generate.text_generator import TextGenerator  # noqa: PLC0415
    from runner.records.cells import find_cell  # noqa: PLC0415

    generator = TextGenerator(find_cell(root, run).folder, average=average)
    filling_in(generator)
    try:
        how = [
            Denoising(
                max_new_tokens=tokens,
                max_canvas=max(tokens, max_tokens),
                expansions=expansions,
                temperature=temperature,
                top_p=top_p,
                algorithm=algorithm,
                steps=steps,
                seed=seed,
                sample=sample,
            )
            for sample in range(n)
        ]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for done in generator.infill([(prefix, suffix)] * n, how):
        typer.echo(f"{prefix}{done.text}{suffix}" if whole else done.text)
