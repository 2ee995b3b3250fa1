"""The resolved precision of a cell: the format of each GEMM operand of each layer, and why."""

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import torch
from rich.table import Table

from kernels.native import refuse_capability
from models.precision import Choice
from models.recipes import linear_recipe
from runner.machine.hardware import gpu_named
from runner.records.config import RunConfig


def resolve(run: RunConfig, vocab_size: int) -> tuple[Choice, ...]:
    """Return the choices of `run` without allocating weights, () if nothing is quantised.

    Raises:
        ValueError: the recipe does not fit the model, or the hardware lacks backend=native.
    """
    if run.precision.backend == "native":
        _refuse_hardware(run)
    return _resolve(run.precision, run.model, vocab_size) if run.precision.quantised else ()


def _refuse_hardware(run: RunConfig) -> None:
    resources, device = run.resources, run.train.device
    gpu = gpu_named(resources.gpu) if resources.gpu else None
    on_cpu = device == "cpu" or not (resources.gpus or torch.cuda.is_available())
    if gpu is None and not on_cpu:
        return  # the job's node, unknown here, refuses itself
    try:
        refuse_capability(linear_recipe(run.precision.default), gpu.capability if gpu else None)
    except ValueError as error:
        raise ValueError(f"precision.backend=native: {error}; use precision.backend=auto") from None


@lru_cache
def _resolve(precision: Any, model: Any, vocab_size: int) -> tuple[Choice, ...]:
    with torch.device("meta"):
        bound = precision.build(torch.device("cpu"), planning=True)
        bound.prepare(model.build(vocab_size, 0))
    return tuple(bound.table)


def choices_table(choices: Sequence[Choice]) -> Table:
    """Return a table in which layers with equal choices share rows, as layers.{0,1,2}.attn.qkv."""
    layers: dict[str, list[Choice]] = {}
    for choice in choices:
        layers.setdefault(choice.layer, []).append(choice)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, own in layers.items():
        rows = tuple((c.operand, c.format, c.hadamard, c.backend, c.why) for c in own)
        groups.setdefault(rows, []).append(name)
    table = Table(box=None, pad_edge=False)
    for column in ("layers", "GEMM operand", "format", "Hadamard", "backend", "why"):
        table.add_column(column)
    for rows, names in groups.items():
        labels = _folded(names)
        if len({fmt for _, fmt, *_ in rows}) == 1:
            rows = (("all", *rows[0][1:]),)
        for label, row in zip_longest(labels, rows):
            operand, fmt, hadamard, backend, why = row or ("", "", "", "", "")
            table.add_row(label, operand, fmt, str(hadamard or ""), backend, why)
    return table


def _folded(names: list[str]) -> list[str]:
    """Return the names with those merged that differ in numbers: layers.{0,1}.experts.{0,1}.up."""
    split = [re.split(r"(\d+)", name) for name in names]
    for index in reversed(range(1, max(map(len, split)), 2)):
        groups: dict[tuple[str, ...], list[str]] = {}
        for parts in split:
            number = parts[index] if index < len(parts) else ""
            rest = (*parts[:index], "", *parts[index + 1 :])
            groups.setdefault(rest, []).append(number)
        split = []
        for rest, numbers in groups.items():
            merged = f"{{{','.join(numbers)}}}" if numbers != [""] else ""
            split.append([*rest[:index], merged, *rest[index + 1 :]])
    return ["".join(parts) for parts in split]
