"""The model card of an exported cell, written from the run's own records."""

import json
import re
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from runner.data.corpus import encode_with_special, load_tokenizer, source_name, source_weight
from runner.machine.text_files import read_json
from runner.machine.typed_json import checked
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


# A card is for others, to whom folders of this machine say nothing: of an absolute path it keeps
# the last part. The slashes of addresses (https://...) and of names (t/bleu) are none.
_LOCAL_PATH = re.compile(r"(?<![\w./~-])~?/(?![/\s])[^\n|,;'\"`()\[\]{}=]*[^\s|,;'\"`()\[\]{}=]")


class _Score(TypedDict):
    name: str
    value: float
    stderr: float | None
    n: int


class _Report(TypedDict):
    scores: list[_Score]


class _Choice(TypedDict):
    layer: str
    operand: str
    format: str
    backend: str


def model_card(cell: Cell, architecture: str, dtype: str, license_name: str | None) -> str:
    """Return the text of README.md, with the front matter that the hub reads."""
    cfg, folder = cell.config, cell.folder
    summary = _read(folder / "summary.json", dict[str, Any]) or {}
    last = latest(folder, *_MEASURED)
    measured = [[name, f"{last[name]:.6g}"] for name in _MEASURED if name in last]
    sources = [
        [source_name(source), f"{source_weight(source):g}", content["content"]]
        for source, content in zip(
            getattr(cfg.data, "sources", ()), cell.science["data.sources"], strict=True
        )
    ]
    title = cell.label if cell.label != folder.name else cfg.name
    sizes = [[key, str(value)] for key, value in summary.items()]
    science = [[k, json.dumps(v)] for k, v in flatten(cell.science).items() if k != "data.sources"]
    precision = _precision(_read(folder / "precision.json", list[_Choice]), cfg.precision.compute)
    parts = [
        _front_matter(architecture, license_name),
        f"# {title} ({cell.fingerprint})",
        f"{architecture}, weights in {dtype}. Trained with Espalier; "
        f"state of the run: {cell.state}.",
        "## Data\n\n" + _table(["source", "weight", "content"], sources),
        f"Tokenizer: {cfg.tokenizer.kind}; {_special_tokens(folder)}; "
        f"sequences of {cfg.train.sequence_length} tokens.",
        "## Training\n\n" + _table(["", ""], sizes),
        "## Losses\n\nNats per token at the end of training.\n\n"
        + _table(["measure", "value"], measured),
        *_evaluations(folder),
        "## Precision\n\n" + precision,
        "## Config\n\n" + _table(["key", "value"], science),
    ]
    return without_local_paths("\n\n".join(parts)) + "\n"


def without_local_paths(text: str) -> str:
    """Return `text` with the last part of each absolute path for the path."""
    return _LOCAL_PATH.sub(lambda found: Path(found.group()).name, text)


def _front_matter(architecture: str, license_name: str | None) -> str:
    lines = [f"license: {license_name or 'unknown'}", "library_name: transformers"]
    lines.append("tags: [espalier]")
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        lines.append("pipeline_tag: text-generation")
    return "\n".join(["---", *lines, "---"])


def _evaluations(folder: Path) -> list[str]:
    """Return a section on the benchmark scores in evals/, none without scores."""
    rows = [
        [row["name"], f"{row['value']:.4f}", _number(row["stderr"]), str(row["n"])]
        for file in sorted(folder.glob("evals/*.json"))
        for row in _read(file, _Report)["scores"]
    ]
    head = ["score", "value", "standard error", "n"]
    return ["## Evaluations\n\n" + _table(head, rows)] if rows else []


def _precision(table: list[dict[str, Any]] | None, compute: str) -> str:
    if not table:
        return f"Every layer in {compute}, master weights in fp32."
    rows = [[row["layer"], row["operand"], row["format"], row["backend"]] for row in table]
    return _table(["layer", "GEMM operand", "format", "backend"], rows)


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4f}"


def _special_tokens(folder: Path) -> str:
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    around = ", ".join(map(str, encode_with_special(tokenizer, "")))
    added = f"it adds the ids {around} to a text, " if around else ""
    return f"{added}the end of a document is id {tokenizer.eos}"


def _read(file: Path, shape: Any) -> Any:
    return checked(read_json(file), shape, str(file)) if file.exists() else None


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
