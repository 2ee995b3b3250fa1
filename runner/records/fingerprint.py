"""The fingerprint of a run, a hash of the science half of its config: equal for equal runs.

It covers the validated science keys, the content (never the path) of data, tokenizer, benchmarks
and imported weights, and the `numerics` revision of each config class. A field that cannot change
a result is declared so (`models.config.execution`); no key is in both halves.
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
    revision,
    walk_configs,
)
from runner.data import pretrained
from runner.data.corpus import content_hash, source_weight
from runner.records.config import NODES, RunConfig, execution_half, flatten, freeze, is_among
from runner.records.earlier_configs import EVALUATE, TRAIN
from runner.records.inputs import InputConfig

DIGITS = 16

# New path -> old path: keys are hashed under their old paths, so that a rename keeps old cells.
RENAMES: dict[str, str] = {}

_SAMPLES, _EVAL_BATCH = "train.samples_per_forward", "eval.batch_size"
_EVAL_BATCH_NEUTRAL = 16  # the value of all runs made before it was hashed


@dataclass(frozen=True)
class Contents:
    """The hashes of the content that a run reads.

    Args:
        tokenizer, init, benchmarks: "" if the run reads none.
        sources: those of the data sources, in order.
        others: (dotted path, hash) of each further config that has a `content_hash`.
    """

    tokenizer: str = ""
    init: str = ""
    benchmarks: str = ""
    sources: tuple[str, ...] = ()
    others: tuple[tuple[str, str], ...] = ()


def contents_of(run: RunConfig, known: dict[str, Any] | None = None) -> Contents:
    """Return the hashes of the content that `run` reads; this reads all the files.

    Args:
        known: hashes by the config that reads, filled by each call; hand it in again so that the
            runs of a sweep read the same text once.
    """
    known = {} if known is None else known

    def hashed(cfg: Any, read: Callable[[Any], Any] = content_hash) -> Any:
        key = json.dumps([read.__name__, plain(cfg, target=True)])
        if key not in known:
            known[key] = read(cfg)
        return known[key]

    harness = getattr(run.eval, "harness", None)
    reads = getattr(run.data, "reads_template", False)
    return Contents(
        tokenizer=(hashed(run.tokenizer) or "")
        + (hashed(run.tokenizer, _template) if reads else ""),
        init=hashed(run.init, pretrained.content_hash) if run.init else "",
        benchmarks=hashed(harness) if harness is not None and harness.tasks else "",
        sources=tuple(hashed(run.data) or ()),
        others=tuple(
            (path, hashed(cfg))
            for path, cfg in _configs(run)
            if path not in ("data", "tokenizer") and hasattr(cfg, "content_hash")
        ),
    )


def _template(tokenizer: Any) -> str:
    own = getattr(tokenizer, "template_hash", None)
    return "" if own is None else str(own())


def _configs(run: RunConfig) -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, config) of each config that is part of the fingerprint of `run`."""
    for node in ("work", *NODES):
        for path, cfg in walk_configs(node, getattr(run, node)) if getattr(run, node) else ():
            if not path.startswith("eval.also.") or _counts(run, cfg):
                yield path, cfg


def _counts(run: RunConfig, evaluation: Any) -> bool:
    """Return whether an evaluation of `eval.also` is hashed: by evaluating runs only."""
    return _is(run.work, EVALUATE) and getattr(evaluation, "counts", True)


def _is(work: Any, target: str) -> bool:
    return released_name(type(work)) == target


def science(run: RunConfig, contents: Contents) -> dict[str, Any]:
    """Return the dotted science keys of `run` and their values, with `contents` for paths.

    Renamed keys and classes have their first names, so that runs keep their fingerprints.
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
    for path, value in _configs(run):
        _drop_neutral_within(value, _part(node, path))
    keys = {k: v for k, v in flatten(node).items() if not is_among(k, execution)}
    for path, value in _configs(run):
        if f"{path}._target_" not in keys:
            continue
        keys[f"{path}.numerics"] = revision(value, run.model)
        keys[f"{path}._target_"] = released_name(type(value))
        for neutral in _neutral_fields(value):
            keys = _without(keys, f"{path}.{neutral}")
    if run.eval is not None and run.eval.harness.tasks:
        keys["eval.harness.data"] = contents.benchmarks
    keys |= {f"{path}.content": digest for path, digest in contents.others}
    return {RENAMES.get(k, k): v for k, v in (keys | derived(run)).items()}


def _neutral_fields(cfg: Any) -> list[str]:
    """Return the fields of a config that are at a value that is not hashed."""
    declared = {f.name: f.metadata.get("neutral", ()) for f in dataclasses.fields(cfg)}
    return [name for name, values in declared.items() if getattr(cfg, name) in values]


def _part(node: Any, path: str) -> Any:
    """Return what stands at a dotted path of `node`, None if nothing does."""
    for key in path.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _drop_neutral_within(cfg: Any, node: Any) -> None:
    """Remove from `node`, a config as plain data, the neutral fields of the configs it holds."""
    for item in dataclasses.fields(cfg):
        held, data = getattr(cfg, item.name), node.get(item.name) if isinstance(node, dict) else ()
        # A source's node is its content's hash and weight, whatever fields it has.
        several = isinstance(held, (tuple, list)) and isinstance(data, (tuple, list))
        for part, plain_part in zip(*((held, data) if several else ([held], [data])), strict=False):
            if dataclasses.is_dataclass(part) and not isinstance(part, type):
                _drop_neutral_within(part, plain_part)
                for name in _neutral_fields(part) if isinstance(plain_part, dict) else ():
                    plain_part.pop(name, None)


def _as_first_released_eval(run: RunConfig, node: dict[str, Any]) -> None:
    """Remove from `node`, the node eval, the benchmarks and evaluations that are not hashed."""
    if not run.eval.harness.tasks:
        del node["harness"]
    counted = {k: v for k, v in node.pop("also").items() if _counts(run, run.eval.also[k])}
    if counted:
        node["also"] = counted


def _as_first_released_work(run: RunConfig, node: dict[str, Any]) -> None:
    """Rewrite `node` in the keys of the first release, so that old runs keep their fingerprints.

    Work that trains has no key, work that evaluates is train.steps=0, a single input `init` is
    upstream.
    """
    if _is(run.work, TRAIN):
        del node["work"]
    elif _is(run.work, EVALUATE):
        del node["work"]
        node["train"] |= {"steps": 0, "tokens": None, "flops": None, "tokens_per_parameter": None}
    not_hashed = set(execution_keys(InputConfig, {}))
    inputs = {
        name: {key: value for key, value in given.items() if key not in not_hashed}
        for name, given in node.pop("inputs").items()
    }
    init = inputs.get("init")
    if init is not None and not init["all"]:
        node["upstream"] = {"run": init["runs"][0], "take": init["take"]}
        del inputs["init"]
    if inputs:
        node["inputs"] = inputs


def samples_depend_on_each_other(run: RunConfig) -> bool:
    """Return whether a sample's loss depends on its micro-batch, by the model or the precision."""
    if run.train is None:
        return False
    length = run.train.sequence_length
    if any(couples_samples(part, length) for part in (run.model, run.precision)):
        return True
    # Blocks along tokens, and the dice of stochastic rounding, follow the rows of a product.
    regrouped = getattr(run.model, "regroups_tokens", False)
    return bool(regrouped and getattr(run.precision, "quantised", False))


def derived(run: RunConfig) -> dict[str, int]:
    """Return the batch sizes that count where samples of one forward pass depend on each other.

    Those at their neutral values are left out.
    """
    if not samples_depend_on_each_other(run):
        return {}
    train = run.train
    samples = train.forward_samples(run.resources.num_processes)
    keys = {_SAMPLES: samples} if samples != train.batch_size else {}
    if run.eval is not None and run.eval.batch_size != _EVAL_BATCH_NEUTRAL:
        keys[_EVAL_BATCH] = run.eval.batch_size
    return keys


def evaluation_key(run: str, evaluation: Any) -> str:
    """Return <key> of evals/<key>.json, for an evaluation of the run with fingerprint `run`."""
    node = plain(evaluation)
    half = set(execution_keys(type(evaluation), node))
    _drop_neutral_within(evaluation, node)
    for name in _neutral_fields(evaluation):
        del node[name]
    keys = {k: v for k, v in flatten(node).items() if not is_among(k, half)}
    keys |= {
        "run": run,
        "_target_": released_name(type(evaluation)),
        "numerics": numerics_of(type(evaluation)),
    }
    return fingerprint(keys | {"content": content_hash(evaluation)})


def earlier_fingerprint(keys: Mapping[str, Any]) -> str | None:
    """Return the fingerprint without derived keys, as of earlier releases; None if none is set."""
    earlier = {k: v for k, v in keys.items() if k not in (_SAMPLES, _EVAL_BATCH)}
    return fingerprint(earlier) if len(earlier) < len(keys) else None


def _without(keys: dict[str, Any], path: str) -> dict[str, Any]:
    return {k: v for k, v in keys.items() if k != path and not k.startswith(f"{path}.")}


def fingerprint(keys: Mapping[str, Any]) -> str:
    """Return the fingerprint of a run with these science keys, 16 hex digits."""
    text = json.dumps(keys, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
