"""Quantisation as cells: each trained cell gives one for each scheme, which trains nothing."""

from collections.abc import Sequence
from pathlib import Path

from models.scheme import parse_scheme
from runner.grid.evaluation_cells import cells_of, without_training
from runner.machine.errors import ConfigError
from runner.records import checkpoint_folder
from runner.records.cells import Cell, make_cells
from runner.records.config import parse_overrides, set_key

_QUANTISE = "runner.work.config.QuantiseWork"


def quantised_cells(
    root: Path,
    target: str,
    schemes: Sequence[str],
    overrides: Sequence[str],
    *,
    average: bool = False,
) -> tuple[list[Cell], str, list[str]]:
    """Return (cells, the sweep's name, a line for each run left out and why).

    Args:
        target: a run, or a sweep of which all cells are quantised.
        schemes: see `models.scheme`.
        overrides: key=value; a key without dots is of `work`.
        average: take the averaged weights.

    Raises:
        ConfigError: `target` is neither, a scheme or an override is malformed, or nothing can be
            quantised.
    """
    for scheme in schemes:
        try:
            parse_scheme(scheme)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    changes = {
        key if "." in key else f"work.{key}": value
        for key, value in parse_overrides(overrides).items()
    }
    sources, name = cells_of(root, target)
    points, choices, skipped = [], [], []
    for cell in sources:
        if cell.config.model is None or not checkpoint_folder.listing(cell.folder / "checkpoints"):
            skipped.append(f"{cell.fingerprint} ({cell.label}) has no model: left out")
            continue
        if hasattr(cell.config.work, "stored_form"):
            skipped.append(f"{cell.fingerprint} ({cell.label}) is quantised already: left out")
            continue
        for scheme in schemes:
            node = without_training(cell, f"{name}-quantised", "average" if average else "weights")
            node["work"] = {"_target_": _QUANTISE, "scheme": scheme}
            for key, value in changes.items():
                set_key(node, key, value)
            points.append((f"{cell.label} {scheme}".strip(), node))
            choices.append(cell.choices)
    if not points:
        raise ConfigError(
            "\n".join([*skipped, f"nothing of {target} can be quantised; train it first"])
        )
    return make_cells(points, choices), f"{name}-quantised", skipped
