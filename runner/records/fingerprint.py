"""What makes two runs the same run: the science half of the config, hashed.

A fingerprint covers the validated science keys, the content (never the path) of data and tokenizer
and the `numerics` revision of each config class. EXECUTION lists every key that cannot change a
result; no key is in both halves.
"""

import dataclasses
import hashlib
import json
from fnmatch import fnmatchcase
from typing import Any

from models.config import released_name, with_inner
from runner.data import benchmark_files as benchmark
from runner.data.pretrained import content
from runner.records.config import NODES, RunConfig, flatten, freeze

EXECUTION = (
    "name",
    "root",
    "track.*",
    "resources.*",
    "precision.backend",
    "precision.check_finite",
    "precision.diagnostics_every",
    "data.num_workers",
    "train.micro_batch",
    "train.compile",
    "train.activation_checkpointing",
    "train.parallel",
    "train.profile",
    "train.deterministic",
    "train.device",
    "train.threads",
    "train.log_every",
    "train.checkpoint.*",
    "eval.batch_size",
    "eval.sample_tokens",
    "eval.prompt",
    "eval.details",
    "eval.induction",
    "eval.harness.batch_size",
    "eval.harness.include",
    "eval.harness.follow",
    "eval.harness.allow_unsafe_code",
)

DIGITS = 16

# new path -> old path: applied backwards before hashing, so that a rename keeps old cells.
RENAMES: dict[str, str] = {}


def is_execution(key: str) -> bool:
    """True where the dotted `key` cannot change a result."""
    return any(fnmatchcase(key, pattern) for pattern in EXECUTION)


def content_of(run: RunConfig) -> list[str]:
    """Return the hashes of the tokenizer, the origin and each source, in that order: this reads the files."""
    origin, harness = content(run.init) if run.init else "", run.eval.harness
    asked = benchmark.content(harness.tasks, harness.data, harness.include)
    return [run.tokenizer.content_hash(), origin, asked, *run.data.content_hash()]


def science(run: RunConfig, hashes: list[str]) -> dict[str, Any]:
    """Return the dotted science keys of `run` and their values, paths replaced by `content_of`."""
    plain = freeze(run)
    plain["data"]["sources"] = [
        {"content": digest, "weight": source.weight}
        for digest, source in zip(hashes[3:], run.data.sources, strict=True)
    ]
    plain["tokenizer"]["path"], plain["init"] = hashes[:2]
    if run.eval.harness.tasks:
        plain["eval"]["harness"]["data"] = hashes[2]
    else:
        del plain["eval"]["harness"]
    if run.upstream is None:  # runs from before there were stages keep their name
        del plain["upstream"]
    if run.init is None:  # ... or imported models
        del plain["init"]
    keys = {k: v for k, v in flatten(plain).items() if not is_execution(k)}
    for node in NODES:
        for path, value in with_inner(node, getattr(run, node)):
            keys[f"{path}.numerics"] = type(value).numerics
            keys[f"{path}._target_"] = released_name(type(value))
            for field in dataclasses.fields(value):
                default = field.metadata.get("neutral", dataclasses.MISSING)
                if getattr(value, field.name) == default:
                    keys = _without(keys, f"{path}.{field.name}")
    return {RENAMES.get(k, k): v for k, v in keys.items()}


def _without(keys: dict[str, Any], path: str) -> dict[str, Any]:
    return {k: v for k, v in keys.items() if k != path and not k.startswith(f"{path}.")}


def fingerprint(keys: dict[str, Any]) -> str:
    """Return the hex digits that name the folder of a run with these science keys."""
    text = json.dumps(keys, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
