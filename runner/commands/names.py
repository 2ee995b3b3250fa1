"""Labels of the cells of a sweep, from overrides, and the name of a grid that was given none."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from runner.commands.overrides import key_of
from runner.grid.language import Point
from runner.records.cells import Cell
from runner.records.config import NODES, RunConfig, execution_half, is_among, target_class
from runner.records.contracts import reads


def with_grid_name(cells: list[Cell], arguments: Sequence[str]) -> list[Cell]:
    """Return `cells` with a name for their sweep if it has several cells and was given no name.

    The name, grid-<hash>, is that of the set of cells: grids of one root do not become one sweep,
    and the same command finds its own again.
    """
    given = any(key_of(argument) == "name" for argument in arguments)
    if given or len(cells) < 2 or {cell.config.name for cell in cells} != {RunConfig.name}:
        return cells
    text = "".join(sorted(cell.fingerprint for cell in cells))
    name = f"grid-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    return [replace(cell, config=replace(cell.config, name=name)) for cell in cells]


def label(point: Point, points: list[Point], node: dict[str, Any]) -> str:
    """Return a label of the keys that vary within the sweep: `gpt_nano bf16 lr=1e-3`.

    A single point is labelled by all its overrides but paths, execution keys and nodes that its
    work does not read.
    """
    common = set(point).intersection(*map(set, points)) if len(points) > 1 else set()
    parts = [o.lstrip("+").partition("=") for o in point if o not in common]
    if len(points) == 1:
        work = target_class("work", node["work"]["_target_"])
        idle = execution_half(node) | set(NODES).difference(reads(work))
        parts = [p for p in parts if not is_among(p[0].lstrip("~"), idle) and "path" not in p[0]]
    keys = [key.rpartition(".")[2] for key, _, _ in parts]
    words = []
    for (key, _, value), last in zip(parts, keys, strict=True):
        shown = key if keys.count(last) > 1 else last
        if key.startswith("~"):  # the default of its class applies, which is not null
            words.append(f"~{shown.lstrip('~')}")
        else:
            words.append(value if key in ("work", *NODES) else f"{shown}={value}")
    return " ".join(words)
