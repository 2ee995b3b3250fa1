"""From a composed YAML node to a typed, frozen RunConfig, and from there to JSON and back.

`validate` checks that every key is known, every value has its type and every `_target_` names a
config class. What it returns is frozen and hashed, so `1e-3` and `0.001` are one value.
"""

import dataclasses
import difflib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from models.config import config, configs_in, execution, execution_keys, plain
from models.config import target_class as named_class
from runner.data.corpus import planned_vocab_size
from runner.machine.errors import ConfigError
from runner.machine.typed_json import adapter
from runner.records.contracts import added_tokens, check, reads
from runner.records.earlier_configs import upgrade_config
from runner.records.inputs import InputConfig

if TYPE_CHECKING:
    from pydantic import ValidationError

# Groups whose YAML node names its class by `_target_`; a kind of work says which of them it reads.
NODES = ("model", "precision", "data", "tokenizer", "task", "optim", "schedule", "train", "eval")
SETTINGS = ("track", "resources")
T = TypeVar("T")
_SEEDS = 2**63  # torch's generators take no larger ones


@config
class RunConfig:
    """One fully resolved run. Each node is the config object that its `_target_` names.

    Args:
        work: the kind of work; nodes that it does not read are None.
        model: the architecture and its sizes.
        precision: formats in which the matrix products are computed.
        data: the text, conversations or synthetic sequences to train and validate on.
        tokenizer: how text becomes tokens.
        task: the loss, and what a model is judged by.
        optim: the optimiser.
        schedule: the learning rate over the steps.
        train: batch, budget and execution.
        eval: what is measured in training and at its end, and when.
        track: where metrics go beside the run folder.
        resources: processes, GPUs, memory and time of a cell.
        inputs: other runs that this one reads, by name; the model to start from is named `init`.
        name: the sweep (and MLflow experiment) that the run belongs to.
        root: the folder of runs/, sweeps/, mlflow/ and the token cache.
        seed: of initialisation, data order and dropout.
        init: a pretrained model to start from, hf:DIR or hf:ORG/NAME; it fixes model and
            tokenizer. With an input named init too, the weights, or those of the adapter on the
            pretrained model, are that run's.
    """

    work: Any
    model: Any = None
    precision: Any = None
    data: Any = None
    tokenizer: Any = None
    task: Any = None
    optim: Any = None
    schedule: Any = None
    train: Any = None
    eval: Any = None
    track: Any = execution()
    resources: Any = execution()
    inputs: dict[str, InputConfig] = field(default_factory=dict, hash=False)
    name: str = execution("default")
    root: str = execution(".")
    seed: int = 0
    init: str | None = None


def root_option(run: RunConfig) -> str:
    """Return the option by which a verb finds what `run` wrote, "" where it needs none."""
    return "" if run.root == "." else f" --root {run.root}"


def validate(node: Mapping[str, Any]) -> RunConfig:
    """Return the typed config of a composed node (strings, numbers, lists, dicts) of any release.

    Raises:
        ConfigError: a key or a value is invalid; the message names it and the valid choices.
    """
    node = upgrade_config(node)
    _refuse_unknown("", node, [f.name for f in dataclasses.fields(RunConfig)])
    values: dict[str, Any] = {"work": _build_node("work", node["work"])}
    read = reads(values["work"])
    for key in (*NODES, *SETTINGS):
        if key in NODES and key not in read:
            values[key] = None
            continue
        if node.get(key) is None:
            raise ConfigError(f"{key} is missing; choose one of conf/{key}/*.yaml")
        values[key] = _build_node(key, node[key])
    run = typed("", RunConfig, {**node, **values})
    _cross_check(run)
    return run


def _build_node(path: str, node: Any) -> Any:
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(f"{path}={node!r} must be a mapping with `_target_: package.ConfigClass`")
    cls = target_class(path, str(node["_target_"]))
    values = {k: _inner(f"{path}.{k}", v) for k, v in node.items() if k != "_target_"}
    for item in dataclasses.fields(cls):
        default, given = item.metadata.get("items"), values.get(item.name)
        if default is not None and isinstance(given, (list, tuple)):
            values[item.name] = tuple(
                typed(f"{path}.{item.name}.{index}", default, part)
                if isinstance(part, Mapping)
                else part
                for index, part in enumerate(given)
            )
    return typed(path, cls, values)


def _inner(path: str, value: Any) -> Any:
    """Return `value` with the nodes inside it built."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            return _build_node(path, value)
        return {key: _inner(f"{path}.{key}", item) for key, item in value.items()}
    if isinstance(value, list):
        return [_inner(f"{path}.{index}", item) for index, item in enumerate(value)]
    return value


def typed(path: str, cls: type[T], node: Mapping[str, Any]) -> T:
    """Return the plain `node` as a `cls`; `path`, its dotted path in the config, is for messages.

    Raises:
        ConfigError: a key is unknown (the valid ones are listed) or a value has the wrong type.
    """
    _refuse_unknown(path, node, [f.name for f in dataclasses.fields(cls)])  # type: ignore[arg-type]
    from pydantic import ValidationError  # noqa: PLC0415  (0.1 s, which help and Tab do without)

    try:
        checked: T = adapter(cls).validate_python(dict(node))  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigError(_explain(path, cls, error)) from None
    return checked


def target_class(path: str, target: str) -> Any:
    """Return the config dataclass that `target`, a `package.module.Class`, names.

    Raises:
        ConfigError: it cannot be imported or is no dataclass.
    """
    try:
        cls = named_class(target)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}._target_={target} cannot be imported: {error}") from None
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ConfigError(f"{path}._target_={target} must name a config dataclass")
    return cls


def _refuse_unknown(path: str, given: Mapping[str, Any], valid: list[str]) -> None:
    for key in given:
        if key not in valid:
            raise ConfigError(_unknown(f"{path}.{key}" if path else str(key), valid))


def _unknown(where: str, valid: Sequence[str]) -> str:
    near = difflib.get_close_matches(where.rpartition(".")[2], valid, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{where} is not a key{hint}; valid: {', '.join(valid)}"


def _fields_below(cls: Any, keys: Sequence[Any]) -> list[str]:
    """Return the fields of the config that `keys` lead to from `cls`, of the last one known."""
    for key in keys:
        within = configs_in(get_type_hints(cls).get(key))
        if not within:
            break
        cls = within[0]
    return [field.name for field in dataclasses.fields(cls)]


def _explain(path: str, cls: Any, error: "ValidationError") -> str:
    lines = []
    for item in error.errors():
        where = ".".join([path] * bool(path) + [str(part) for part in item["loc"]])
        if item["type"] == "missing":
            lines.append(f"{where} is missing and has no default")
        elif item["type"] == "extra_forbidden" or item["type"] == "unexpected_keyword_argument":
            lines.append(_unknown(where, _fields_below(cls, item["loc"][:-1])))
        elif item["type"] == "value_error":
            lines.append(f"{where}: {item['msg'].removeprefix('Value error, ')}")
        else:
            message = item["msg"].removeprefix("Input ")
            lines.append(f"{where}={item['input']!r}: {message}")
    return "\n".join(lines)


def _cross_check(run: RunConfig) -> None:
    """Raise ConfigError for combinations of nodes that no single node can check."""
    if not 0 <= run.seed < _SEEDS:
        raise ConfigError(f"seed={run.seed} must lie in 0 to 2**63 - 1")
    try:
        if run.train is not None:
            run.train.check(run.resources.num_processes)
        if run.tokenizer is not None and run.train is not None:
            vocab = planned_vocab_size(run.tokenizer, added_tokens(run.task))
            seq = run.train.sequence_length
            check(run.model, vocab or 1, seq)
            check(run.data, run.tokenizer, seq)
            check(run.task, run)
            for evaluation in getattr(run.eval, "further", dict)().values():
                check(evaluation, run)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def refuse_infinite(run: RunConfig) -> None:
    """Raise ConfigError if a value of `run` is NaN or infinite: JSON has no such numbers."""
    odd = [f"{k}={v}" for k, v in _numbers("", freeze(run)) if not math.isfinite(v)]
    if odd:
        raise ConfigError(f"{', '.join(odd)} must be a finite number")


def _numbers(path: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield (dotted path, number) of each float in plain data."""
    if isinstance(value, float):
        yield path, value
    elif isinstance(value, (Mapping, list)):
        parts = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, part in parts:
            yield from _numbers(f"{path}.{key}".removeprefix("."), part)


def freeze(run: RunConfig) -> dict[str, Any]:
    """Return `run` as JSON data, each node with its `_target_`.

    Raises:
        ConfigError: a value has no JSON form.
    """
    try:
        return {
            f.name: plain(getattr(run, f.name), target=f.name in ("work", *NODES, *SETTINGS))
            for f in dataclasses.fields(run)
            if f.name not in NODES or getattr(run, f.name) is not None
        }
    except TypeError as error:
        raise ConfigError(str(error)) from None


def set_values(cfg: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value as JSON data) of each field of a config that has not its default."""
    for item in dataclasses.fields(cfg):
        value = getattr(cfg, item.name)
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        if value == default:
            continue
        if dataclasses.is_dataclass(value):
            if type(value) is not type(default):
                yield f"{path}{item.name}", type(value).__name__
            yield from set_values(value, f"{path}{item.name}.")
        else:
            yield f"{path}{item.name}", plain(value, target=True)


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Return {key: value} of `key=value` arguments, values parsed as YAML.

    Raises:
        ConfigError: an argument has no `=`, no key, starts with a dash, or has no YAML value.
    """
    overrides = {}
    for argument in arguments:
        key, sign, text = argument.partition("=")
        if not sign or not key or key.startswith("-"):
            raise ConfigError(f"{argument!r} is no override; give key=value")
        import yaml  # noqa: PLC0415

        try:
            overrides[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            reason = str(getattr(error, "problem", None) or error)
            raise ConfigError(f"{argument!r} is no override: {reason}; quote the value") from None
    return overrides


def execution_half(node: Mapping[str, Any]) -> set[str]:
    """Return the dotted keys of a composed or frozen node that cannot change a result.

    Nor can the keys below them.
    """
    keys = set(execution_keys(RunConfig, node))
    for name in ("work", *NODES):
        part = node.get(name)
        if isinstance(part, Mapping) and "_target_" in part:
            keys |= set(execution_keys(target_class(name, str(part["_target_"])), part, f"{name}."))
    return keys


def is_among(key: str, keys: Collection[str]) -> bool:
    """Return whether the dotted `key` is one of `keys` or stands below one."""
    parts = key.split(".")
    return any(".".join(parts[:end]) in keys for end in range(1, len(parts) + 1))


def set_key(node: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of a nested mapping in place; below a list a key's part is an index.

    Raises:
        ConfigError: a part of the key stands for neither a mapping nor an entry of a list.
    """
    *path, last = key.split(".")
    parent: Any = node
    try:
        for part in path:
            parent = parent[int(part)] if isinstance(parent, list) else parent.setdefault(part, {})
        parent[int(last) if isinstance(parent, list) else last] = value
    except (TypeError, AttributeError, ValueError, IndexError):
        size = f"a list of {len(parent)}" if isinstance(parent, list) else f"{parent!r}"
        raise ConfigError(f"{key} leads into {size}, which has no such key") from None


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"model.width": 64, ...}` for a nested mapping; lists are leaves."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{path}.")
        else:
            flat[path] = value
    return flat
