"""What makes two runs the same run: the science half of the config, hashed.

A fingerprint covers the validated science keys, the content (never the path) of data, tokenizer,
benchmarks and imported weights, and the `numerics` revision of each config class. A field that cannot
change a result says so where it is declared (`models.config.execution`); no key is in both halves.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.config import couples_samples, released_name, with_inner
from runner.data import pretrained
from runner.records.config import NODES, RunConfig, execution_half, flatten, freeze, is_among

DIGITS = 16

# new path -> old path: applied backwards before hashing, so that a rename keeps old cells.
RENAMES: dict[str, str] = {}

_SAMPLES, _EVAL_BATCH = "train.samples_per_forward", "eval.batch_size"
_EVAL_BATCH_NEUTRAL = 16  # what it was everywhere before it counted


@dataclass(frozen=True)
class Contents:
    """The hashes of what a run reads.

    Args:
        tokenizer, init, benchmarks: "" where there is none.
        sources: of the data, in order.
    """

    tokenizer: str = ""
    init: str = ""
    benchmarks: str = ""
    sources: tuple[str, ...] = ()


def contents_of(run: RunConfig) -> Contents:
    """Return the hashes of what `run` reads: this reads the files."""
    harness = run.eval.harness
    return Contents(
        tokenizer=run.tokenizer.content_hash(),
        init=pretrained.content_hash(run.init) if run.init else "",
        benchmarks=harness.content_hash() if harness.tasks else "",
        sources=tuple(run.data.content_hash()),
    )


def science(run: RunConfig, contents: Contents) -> dict[str, Any]:
    """Return the dotted science keys of `run` and their values, paths replaced by `contents`."""
    plain = freeze(run)
    execution = execution_half(plain)
    plain["data"]["sources"] = [
        {"content": digest, "weight": source.weight}
        for digest, source in zip(contents.sources, run.data.sources, strict=True)
    ]
    plain["tokenizer"]["path"], plain["init"] = contents.tokenizer, contents.init
    if run.eval.harness.tasks:
        plain["eval"]["harness"]["data"] = contents.benchmarks
    else:
        del plain["eval"]["harness"]
    if run.upstream is None:  # runs from before there were stages keep their name
        del plain["upstream"]
    if run.init is None:  # ... or imported models
        del plain["init"]
    keys = {k: v for k, v in flatten(plain).items() if not is_among(k, execution)}
    for node in NODES:
        for path, value in with_inner(node, getattr(run, node)):
            keys[f"{path}.numerics"] = type(value).numerics
            keys[f"{path}._target_"] = released_name(type(value))
            for field in dataclasses.fields(value):
                default = field.metadata.get("neutral", dataclasses.MISSING)
                if getattr(value, field.name) == default:
                    keys = _without(keys, f"{path}.{field.name}")
    return {RENAMES.get(k, k): v for k, v in (keys | _derived(run)).items()}


def samples_depend_on_each_other(run: RunConfig) -> bool:
    """Return whether the model or the precision of `run` makes a sample's numbers depend on its micro-batch."""
    length = run.train.sequence_length
    return any(couples_samples(part, length) for part in (run.model, run.precision))


def _derived(run: RunConfig) -> dict[str, int]:
    """Return what counts where samples of one forward pass depend on each other, and differs from the neutral value."""
    if not samples_depend_on_each_other(run):
        return {}
    train = run.train
    share = train.batch_size // run.resources.num_processes
    samples = min(share, train.micro_batch or share)
    keys = {_SAMPLES: samples} if samples != train.batch_size else {}
    if run.eval.batch_size != _EVAL_BATCH_NEUTRAL:
        keys[_EVAL_BATCH] = run.eval.batch_size
    return keys


def earlier_fingerprint(keys: Mapping[str, Any]) -> str | None:
    """Return the fingerprint that a run had before derived keys counted, None where it has none of them."""
    kept = {k: v for k, v in keys.items() if k not in (_SAMPLES, _EVAL_BATCH)}
    return fingerprint(kept) if len(kept) < len(keys) else None


def _without(keys: dict[str, Any], path: str) -> dict[str, Any]:
    return {k: v for k, v in keys.items() if k != path and not k.startswith(f"{path}.")}


def fingerprint(keys: Mapping[str, Any]) -> str:
    """Return the hex digits that name the folder of a run with these science keys."""
    text = json.dumps(keys, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
