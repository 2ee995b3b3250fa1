"""What schemes cost a trained model: a row of its quantised cells each."""

from collections.abc import Sequence

from rich.table import Table

from runner.records import metrics
from runner.records.cells import Cell

_COLUMNS = (
    "cell",
    "bits/weight",
    "KiB",
    "loss added (95%)",
    "KL",
    "same top-1",
    "tokens/s, 1 and 8",
    "calibrated on",
    "tasks (before)",
)


def quantised_table(cells: Sequence[Cell]) -> Table | None:
    """Return the table of the cells that are done, None if none is.

    Bits have all scales in them; KiB are of the checkpoint, with what stays in full. Differences
    are in nats, tokens/s those of eager decoding; `emulated` has no product of its own.
    """
    table = Table(box=None, pad_edge=False)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "cell" else "right")
    for cell in cells:
        values = metrics.latest(cell.folder)
        if "loss_delta" in values:
            table.add_row(cell.label, *_row(values), _tasks(cell, values))
    return table if table.row_count else None


def _tasks(cell: Cell, values: dict[str, float]) -> str:
    """Return the scores of the benchmarks that the run evaluates, and what it had before."""
    judged = cell.config.eval.further().values()
    tasks = {name for one in judged for name in getattr(one, "tasks", ())}
    before = metrics.latest(cell.inputs["init"][0]) if "init" in cell.inputs else {}
    scores = sorted(name for name in values if name.partition("/")[0] in tasks)
    return ", ".join(
        f"{name} {values[name]:.3f}" + (f" ({before[name]:.3f})" if name in before else "")
        for name in scores
        if not name.endswith("_stderr")
    )


def _row(values: dict[str, float]) -> list[str]:
    low, high = values["loss_delta_low"], values["loss_delta_high"]
    speeds = [values.get(f"tokens_per_s_{rows}") for rows in (1, 8)]
    known = ", ".join(f"{speed:,.0f}" for speed in speeds if speed is not None)
    tokens = values.get("calibration_tokens")
    return [
        f"{values['bits_per_weight']:.2f}",
        f"{values['checkpoint_bytes'] / 1024:,.0f}",
        f"{values['loss_delta']:+.4f} ({low:+.4f} to {high:+.4f})",
        f"{values['kl']:.5f}",
        f"{values['top1_agreement']:.1%}",
        f"{known} emulated" if values["emulated"] else known,
        f"{tokens:,.0f} tokens, {values['quantise_s']:.1f} s" if tokens else "-",
    ]
