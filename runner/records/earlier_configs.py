"""Keys of earlier releases, on the command line and in frozen cells, and what replaces them.

upstream: {run: R, take: T}           inputs: {init: {runs: [R], take: T}}
train.steps=0                         work=evaluate
eval.harness.follow=true              inputs.init.live=true
eval.sample_tokens, eval.prompt       eval.also.samples
eval.details, eval.induction          eval.also.details, eval.also.induction
"""

from collections.abc import Mapping
from typing import Any

from runner.machine.errors import ConfigError

TRAIN = "runner.work.config.TrainWork"
EVALUATE = "runner.work.config.EvaluateWork"
_EVALUATIONS = "runner.evaluate.config"
# Keys of eval that are still taken, and where they went.
OF_EVAL = {
    "sample_tokens": "also.samples.tokens",
    "prompt": "also.samples.prompt",
    "details": "also.details",
    "induction": "also.induction",
}


def upgrade_config(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the node of a run of any release with its keys renamed to those of this release.

    Raises:
        ConfigError: a key that holds others holds something else.
    """
    node = dict(node)
    _refuse_values(node, "inputs", "upstream")
    inputs = {name: _input(given) for name, given in (node.get("inputs") or {}).items()}
    upstream = node.pop("upstream", None)
    if upstream:
        inputs["init"] = _input(upstream)
    work, train = node.get("work") or {"_target_": TRAIN}, node.get("train")
    if isinstance(train, Mapping) and train.get("steps") == 0:
        work, node["train"] = {"_target_": EVALUATE}, {**train, "steps": None}
    measured = node.get("eval")
    if isinstance(measured, Mapping):
        node["eval"] = _eval(measured)
        harness = measured.get("harness")
        if isinstance(harness, Mapping) and "follow" in harness:
            node["eval"]["harness"] = {k: v for k, v in harness.items() if k != "follow"}
            evaluates = work == {"_target_": EVALUATE}
            if harness["follow"] and evaluates and isinstance(inputs.get("init"), Mapping):
                inputs["init"] = {**inputs["init"], "live": True}
    return node | {"work": work, "inputs": inputs}


def _refuse_values(node: Mapping[str, Any], *keys: str) -> None:
    """Raise ConfigError if one of `keys`, dotted paths to keys of `node`, has no keys below it."""
    for key in keys:
        value = node.get(key.rpartition(".")[2]) or {}
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key}={value!r} must be a mapping; set {key}.NAME...=VALUE")


def _input(given: Any) -> Any:
    """Return an input with `runs`; a single `run` becomes a list of one."""
    if not isinstance(given, Mapping) or "run" not in given:
        return given
    rest = {key: value for key, value in given.items() if key != "run"}
    return {**rest, "runs": [given["run"]]}


def _eval(given: Mapping[str, Any]) -> dict[str, Any]:
    node = dict(given)
    _refuse_values(node, "eval.also")
    also = dict(node.get("also") or {})
    tokens, prompt = node.pop("sample_tokens", None), node.pop("prompt", None)
    if tokens == 0:
        also.pop("samples", None)
    else:
        samples = {k: v for k, v in (("tokens", tokens), ("prompt", prompt)) if v is not None}
        if tokens is not None or (samples and "samples" in also):
            _refuse_values(also, "eval.also.samples")
            base = also.get("samples") or {"_target_": f"{_EVALUATIONS}.SamplesConfig"}
            also["samples"] = {**base, **samples}
    for name in ("details", "induction"):
        if node.pop(name, None):
            also.setdefault(name, {"_target_": f"{_EVALUATIONS}.{name.capitalize()}Config"})
    return node | {"also": also}
