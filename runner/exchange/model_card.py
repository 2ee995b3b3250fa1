"""The model card of an exported cell: everything in it is read from the run."""

import json
from pathlib import Path
from typing import Any

from runner.data.corpus import loads, source_name, source_weight
from runner.records.cells import Cell
from runner.records.config import flatten
from runner.records.metrics import latest

_MEASURED = (
    "loss",
    "val_loss",
    "val_bits_per_byte",
    "val_loss_average",
    "step",
    "tokens",
    "flops",
    "wall_s",
)


def model_card(cell: Cell, architecture: str, dtype: str, license_name: str | None) -> str:
    """Return README.md with the front matter that the hub reads."""
    cfg, folder = cell.config, cell.folder
    summary = _read(folder / "summary.json") or {}
    found = latest(folder, *_MEASURED)
    measured = [[name, f"{found[name]:.6g}"] for name in _MEASURED if name in found]
    sources = [
        [source_name(source), f"{source_weight(source):g}", content["content"]]
        for source, content in zip(
            getattr(cfg.data, "sources", ()), cell.science["data.sources"], strict=True
        )
    ]
    front = [
        "---",
        f"license: {license_name or 'unknown'}",
        "library_name: transformers",
        "tags: [espalier]",
    ]
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        front.append("pipeline_tag: text-generation")
    parts = [
        "\n".join([*front, "---"]),
        f"# {cell.label if cell.label != folder.name else cfg.name} ({cell.fingerprint})",
        f"{architecture}, weights in {dtype}. Trained with Espalier; state of the run: {cell.state}.",
        "## Data\n\n" + _table(["source", "weight", "content"], sources),
        f"Tokenizer: {cfg.tokenizer.kind}; the end of a document is id "
        f"{_eos(folder)}; sequences of {cfg.train.sequence_length} tokens.",
        "## Training\n\n" + _table(["", ""], [[k, str(v)] for k, v in summary.items()]),
        "## Losses\n\nNats per token at the end of training.\n\n"
        + _table(["measure", "value"], measured),
    ]
    scores = [_read(file) for file in sorted(folder.glob("evals/*.json"))]
    rows = [
        [row["name"], f"{row['value']:.4f}", _number(row["stderr"]), str(row["n"])]
        for found in scores
        for row in (found or {}).get("scores", [])
    ]
    if rows:
        parts.append("## Evaluations\n\n" + _table(["score", "value", "standard error", "n"], rows))
    table = _read(folder / "precision.json")
    parts.append("## Precision\n\n" + _precision(table, cfg.precision.compute))
    science = [[k, json.dumps(v)] for k, v in flatten(cell.science).items() if k != "data.sources"]
    parts.append("## Config\n\n" + _table(["key", "value"], science))
    return "\n\n".join(parts) + "\n"


def _precision(table: list[dict[str, Any]] | None, compute: str) -> str:
    if not table:
        return f"Every layer in {compute}, master weights in fp32."
    rows = [[row["layer"], row["operand"], row["format"], row["backend"]] for row in table]
    return _table(["layer", "GEMM operand", "format", "backend"], rows)


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4f}"


def _eos(folder: Path) -> int:
    return int(loads((folder / "tokenizer.json").read_text(encoding="utf-8")).eos)


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
