"""What a config is: a frozen, keyword-only dataclass that refuses unknown keys.

Beside its fields a config class may carry
    numerics   an integer (default: 1), raised when the numbers its class produces change: part of the fingerprint
    neutral(v) a field added later: at `v` it does not count in the fingerprint
    execution(v)   a field that cannot change a result: it never counts
    any_config(), any_configs(), configs_of(cls)   fields that hold configs of any class
    released_as   the import path under which it was first used, where a package of somebody else's has
                  moved it (and left an import at the old path); ours stand in `models/moves.py`
"""

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, dataclass_transform, get_args, get_type_hints

from models.moves import released, today

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def config(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass that pydantic validates with extra keys forbidden.

    `dataclass(frozen=True, kw_only=True)` serves as well at the top of a node.
    """
    cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    if "numerics" not in cls.__dict__:
        cls.numerics = 1  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True)(cls)


def neutral(value: Any) -> Any:
    """Declare a field added after its class was first used: default `value`, not hashed there."""
    return field(default=value, metadata={"neutral": value})


def execution(value: Any = MISSING) -> Any:
    """Declare a field that cannot change a result, and if it holds a config nothing in it can."""
    return field(default=value, metadata={"execution": True})


def any_config() -> Any:
    """Declare a field that is None or a config of any class, which its `_target_` names; None is neutral."""
    return field(default=None, metadata={"neutral": None, "configs": True})


def any_configs() -> Any:
    """Declare a field that is a dict of such configs; the empty one is neutral."""
    return field(default_factory=dict, hash=False, metadata={"neutral": {}, "configs": True})


def configs_of(cls: type[Any]) -> Any:
    """Declare a field that is a tuple of `cls` configs, or of any class that its `_target_` names."""
    return field(metadata={"items": cls})


def with_inner(path: str, cfg: Any) -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, config) of `cfg`, which stands at `path`, and of every config in its fields, at any depth."""
    yield path, cfg
    for item in fields(cfg):
        if not item.metadata.get("configs"):
            continue
        value = getattr(cfg, item.name)
        found = value.items() if isinstance(value, Mapping) else [("", value)]
        for key, part in found:
            if is_dataclass(part):
                yield from with_inner(f"{path}.{item.name}.{key}".removesuffix("."), part)


def execution_keys(cls: type[Any], node: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield the dotted keys of the plain `node` of a `cls` that cannot change a result, nor can what is below them."""
    hints = get_type_hints(cls)
    for item in fields(cls):
        key, value = f"{path}{item.name}", node.get(item.name)
        if item.metadata.get("execution"):
            yield key
        elif item.metadata.get("configs") and isinstance(value, Mapping):
            inner = {"": value} if "_target_" in value else value
            for name, part in inner.items():
                if isinstance(part, Mapping) and "_target_" in part:
                    below = f"{key}.{name}".removesuffix(".")
                    yield from execution_keys(target_class(part["_target_"]), part, f"{below}.")
        elif isinstance(value, Mapping):
            for within in _configs_in(hints[item.name]):
                yield from execution_keys(within, value, f"{key}.")


def _configs_in(hint: Any) -> list[type[Any]]:
    """Return the config classes of a type, `X` or `X | None`."""
    return [c for c in (hint, *get_args(hint)) if is_dataclass(c) and isinstance(c, type)]


def plain(value: Any, *, target: bool = False) -> Any:
    """Return a config as JSON-able data; what may be of any class (or all, with `target`) names it as `_target_`.

    Raises:
        TypeError: it holds something else than numbers, strings, lists, mappings and configs.
    """
    if is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        head = {"_target_": _path(cls)} if target else {}
        return head | {f.name: _plain_field(f, getattr(value, f.name)) for f in fields(cls)}
    if isinstance(value, (list, tuple)):
        return [plain(item, target=target) for item in value]
    if isinstance(value, Mapping):
        return {str(k): plain(v, target=target) for k, v in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"{value!r} cannot be frozen: configs hold numbers, strings, lists and mappings"
    )


def _plain_field(item: Field[Any], value: Any) -> Any:
    default = item.metadata.get("items")
    if default is not None:
        return [plain(part, target=type(part) is not default) for part in value]
    return plain(value, target=item.metadata.get("configs", False))


def thaw(cls: type[T], given: Mapping[str, Any]) -> T:
    """Return the config that `plain` made data of, JSON's lists as tuples.

    Raises:
        TypeError: a key that the class does not have.
    """
    hints = get_type_hints(cls)
    values = {}
    for key, value in given.items():
        within = _configs_in(hints.get(key))
        if isinstance(value, Mapping) and within:
            value = thaw(within[0], value)
        values[key] = _thaw_parts(value)
    return cls(**values)


def _thaw_parts(value: Any) -> Any:
    if isinstance(value, Mapping) and "_target_" in value:
        rest = {key: item for key, item in value.items() if key != "_target_"}
        return thaw(target_class(value["_target_"]), rest)
    if isinstance(value, Mapping):
        return {key: _thaw_parts(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


def target_class(target: str) -> Any:
    """Return what `target` names, `package.module.Class`; it may be a path of before a move.

    Raises:
        ImportError, AttributeError, ValueError: it cannot be imported.
    """
    module, _, name = today(target).rpartition(".")
    return getattr(importlib.import_module(module), name)


def couples_samples(cfg: Any, sequence_length: int) -> bool:
    """Return whether, under a model, part or recipe, a sample's numbers depend on its company in a forward pass.

    Experts that are balanced over a batch do that, and scales of whole tensors. A class that says nothing does not.
    """
    says = getattr(cfg, "couples_samples", None)
    return bool(says(sequence_length)) if says is not None else False


def numerics_of(cls: type) -> int:
    """Return the revision of the numbers that config class `cls` produces; 1 where it does not say."""
    return int(getattr(cls, "numerics", 1))


def released_name(cls: type) -> str:
    """Return the import path under which config class `cls` was first used: its name in fingerprints."""
    return str(cls.__dict__.get("released_as") or released(_path(cls)))


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
