"""`espalier precision`: the rounding error of number formats on the weights of a trained cell."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from runner.commands.arguments import Reference, Root

app = typer.Typer(help="Rounding errors of number formats on a trained cell.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Rounding errors of number formats on a trained cell."""


@app.command()
def inspect(
    run: Reference,
    root: Root = Path("."),
    average: Annotated[
        bool, typer.Option(help="Use the averaged weights (train.average).")
    ] = False,
) -> None:
    """Print the SQNR (dB) of each linear layer's weight in each number format.

    The weights are those of the newest checkpoint.
    """
    import torch  # noqa: PLC0415

    from kernels.diagnostics import kurtosis, sqnr_db  # noqa: PLC0415
    from kernels.quantise import pad_to_blocks  # noqa: PLC0415
    from kernels.quantiser import Quantiser  # noqa: PLC0415
    from runner.records.cells import find_cell  # noqa: PLC0415
    from runner.records.trained_model import load_model  # noqa: PLC0415

    formats = {
        "nvfp4 1x16": Quantiser(format="nvfp4", block=(1, 16)),
        "nvfp4 16x16": Quantiser(format="nvfp4", block=(16, 16)),
        "nvfp4 4over6": Quantiser(format="nvfp4", block=(1, 16), four_over_six="mae"),
        "nvfp4 128": Quantiser(format="nvfp4", block=(1, 16), scale="double_block", group=128),
        "ufp4": Quantiser(format="ufp4", block=(1, 16)),
        "mxfp4": Quantiser(format="mxfp4", block=(1, 32), scale="rceil"),
        "mxfp8": Quantiser(format="mxfp8_e4m3", block=(1, 32), scale="rceil"),
        "fp8": Quantiser(format="fp8_e4m3", block=(0, 0), scale="current"),
    }
    model, _, _ = load_model(find_cell(root, run).folder, average=average)
    table = Table(box=None, pad_edge=False)
    for column in ("weight", "shape", "amax", "kurtosis", *formats):
        table.add_column(column, justify="left" if column == "weight" else "right")
    with torch.no_grad():
        for name, module in model.named_modules():
            if not isinstance(module, torch.nn.Linear):
                continue
            weight = module.weight
            amax, kurt = float(weight.abs().amax()), float(kurtosis(weight))
            row = [name, f"{tuple(weight.shape)}", f"{amax:.3g}", f"{kurt:.2f}"]
            for quantiser in formats.values():
                blocked = quantiser.block[0] > 0
                values = pad_to_blocks(weight, quantiser.span) if blocked else weight
                row.append(f"{sqnr_db(values, quantiser):.1f}")
            table.add_row(*row)
    console = Console()
    Console(width=None if console.is_terminal else 200).print(table)
