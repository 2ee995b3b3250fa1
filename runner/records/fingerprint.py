"""What makes two runs the same run: the science half of the config, hashed.

A fingerprint covers the validated science keys, the content (never the path) of data, tokenizer,
benchmarks and imported weights, and the `numerics` revision of each config class. A field that cannot
change a result says so where it is declared (`models.config.execution`); no key is in both halves.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from models.config import (
    couples_samples,
    execution_keys,
    numerics_of,
    plain,
    released_name,
    walk_configs,
)
from runner.data import pretrained
from runner.data.corpus import content_hash, source_weight
from runner.records.config import NODES, RunConfig, execution_half, flatten, freeze, is_among
from runner.records.earlier_configs import EVALUATE, TRAIN

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
        others: (dotted path of a config, hash) of whatever else has a `content_hash`.
    """

    tokenizer: str = ""
    init: str = ""
    benchmarks: str = ""
    sources: tuple[str, ...] = ()
    others: tuple[tuple[str, str], ...] = ()


def contents_of(run: RunConfig, known: dict[str, Any] | None = None) -> Contents:
    """Return the hashes of what `run` reads: this reads the files.

    Args:
        known: of runs before, by the config that reads; filled: the same text is read once, not once a run.
    """
    known = {} if known is None else known

    def hashed(cfg: Any, read: Callable[[Any], Any] = content_hash) -> Any:
        key = json.dumps(plain(cfg, target=True))
        if key not in known:
            known[key] = read(cfg)
        return known[key]

    harness = getattr(run.eval, "harness", None)
    return Contents(
        tokenizer=hashed(run.tokenizer) or "",
        init=hashed(run.init, pretrained.content_hash) if run.init else "",
        benchmarks=hashed(harness) if harness is not None and harness.tasks else "",
        sources=tuple(hashed(run.data) or ()),
        others=tuple(
            (path, hashed(cfg))
            for path, cfg in _configs(run)
            if path not in ("data", "tokenizer") and hasattr(cfg, "content_hash")
        ),
    )


def _configs(run: RunConfig) -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, config) of all that counts in the fingerprint of `run`."""
    for node in ("work", *NODES):
        for path, cfg in walk_configs(node, getattr(run, node)) if getattr(run, node) else ():
            if not path.startswith("eval.also.") or _counts(run, cfg):
                yield path, cfg


def _counts(run: RunConfig, evaluation: Any) -> bool:
    """Return whether an evaluation of `eval.also` is part of a run: of one that evaluates, never of a training."""
    return _is(run.work, EVALUATE) and getattr(evaluation, "counts", True)


def _is(work: Any, target: str) -> bool:
    return released_name(type(work)) == target


def science(run: RunConfig, contents: Contents) -> dict[str, Any]:
    """Return the dotted science keys of `run` and their values, paths replaced by `contents`.

    What has been renamed stands as it was first: runs keep their names.
    """
    node = freeze(run)
    execution = execution_half(node)
    if run.data is not None:
        weights = [source_weight(source) for source in getattr(run.data, "sources", ())]
        weights += [1.0] * (len(contents.sources) - len(weights))
        node["data"]["sources"] = [
            {"content": digest, "weight": weight}
            for digest, weight in zip(contents.sources, weights, strict=True)
        ]
    if run.tokenizer is not None:
        node["tokenizer"]["path"] = contents.tokenizer
    if run.init is None:
        del node["init"]
    else:
        node["init"] = contents.init
    if run.eval is not None:
        _as_first_released_eval(run, node["eval"])
    _as_first_released_work(run, node)
    keys = {k: v for k, v in flatten(node).items() if not is_among(k, execution)}
    for path, value in _configs(run):
        if f"{path}._target_" not in keys:
            continue
        keys[f"{path}.numerics"] = _numerics(value, run)
        keys[f"{path}._target_"] = released_name(type(value))
        for field in dataclasses.fields(value):
            default = field.metadata.get("neutral", dataclasses.MISSING)
            if getattr(value, field.name) == default:
                keys = _without(keys, f"{path}.{field.name}")
    if run.eval is not None and run.eval.harness.tasks:
        keys["eval.harness.data"] = contents.benchmarks
    keys |= {f"{path}.content": digest for path, digest in contents.others}
    return {RENAMES.get(k, k): v for k, v in (keys | derived(run)).items()}


def _numerics(cfg: Any, run: RunConfig) -> int:
    """Return the revision of the numbers that `cfg` produces; a class may tell it by the model (`numerics_with`)."""
    told = getattr(cfg, "numerics_with", None)
    return int(told(run.model)) if told is not None else numerics_of(type(cfg))


def _as_first_released_eval(run: RunConfig, node: dict[str, Any]) -> None:
    """Leave out of `node`, the node eval, what is no part of the run."""
    if not run.eval.harness.tasks:
        del node["harness"]
    counted = {k: v for k, v in node.pop("also").items() if _counts(run, run.eval.also[k])}
    if counted:
        node["also"] = counted


def _as_first_released_work(run: RunConfig, node: dict[str, Any]) -> None:
    """Write training without a word of it, evaluation as train.steps=0, and a single input `init` as upstream."""
    if _is(run.work, TRAIN):
        del node["work"]
    elif _is(run.work, EVALUATE):
        del node["work"]
        node["train"] |= {"steps": 0, "tokens": None, "flops": None, "tokens_per_parameter": None}
    inputs = {
        name: {key: value for key, value in given.items() if key != "live"}
        for name, given in node.pop("inputs").items()
    }
    init = inputs.get("init")
    if init is not None and not init["all"]:
        node["upstream"] = {"run": init["runs"][0], "take": init["take"]}
        del inputs["init"]
    if inputs:
        node["inputs"] = inputs


def samples_depend_on_each_other(run: RunConfig) -> bool:
    """Return whether the model or the precision of `run` makes a sample's numbers depend on its micro-batch."""
    if run.train is None:
        return False
    length = run.train.sequence_length
    return any(couples_samples(part, length) for part in (run.model, run.precision))


def derived(run: RunConfig) -> dict[str, int]:
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


def evaluation_key(run: str, evaluation: Any) -> str:
    """Return the name of evals/<name>.json for an evaluation of the finished run with fingerprint `run`."""
    half = set(execution_keys(type(evaluation), plain(evaluation)))
    keys = {k: v for k, v in flatten(plain(evaluation)).items() if not is_among(k, half)}
    keys |= {
        "run": run,
        "_target_": released_name(type(evaluation)),
        "numerics": numerics_of(type(evaluation)),
    }
    return fingerprint(keys | {"content": content_hash(evaluation)})


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
