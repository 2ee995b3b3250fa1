"""Configs: frozen, keyword-only dataclasses that refuse unknown keys.

A class may have two attributes of its own:
    numerics      integer (default: 1), raised when the numbers its class produces change; in the
                  fingerprint
    released_as   import path of its first release, where a foreign package has moved it since (and
                  keeps an import at the old path); our own moves stand in `models/moves.py`
"""

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from math import inf
from typing import Any, TypeVar, dataclass_transform, get_args, get_type_hints

from models.moves import current_path, released_path

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def config(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass; pydantic forbids keys that are no fields.

    A class that is a node of its own may use `dataclass(frozen=True, kw_only=True)` instead.
    """
    cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    if "numerics" not in cls.__dict__:
        cls.numerics = 1  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True)(cls)


def neutral(value: Any, *others: Any) -> Any:
    """Declare a field added after the first release; its default `value` is not hashed.

    Nor are `others`, values that give the same numbers.
    """
    return field(default=value, metadata={"neutral": (value, *others)})


def execution(value: Any = MISSING) -> Any:
    """Declare a field that cannot change a result, nor can a config in it: it is never hashed."""
    return field(default=value, metadata={"execution": True})


def any_config() -> Any:
    """Declare a field that holds a config of any class, named by its `_target_`, or None.

    None is the default and is not hashed.
    """
    return field(default=None, metadata={"neutral": (None,), "configs": True})


def any_configs() -> Any:
    """Declare a field that holds a dict of configs of any class, each named by its `_target_`.

    The empty dict is the default and is not hashed.
    """
    return field(default_factory=dict, hash=False, metadata={"neutral": ({},), "configs": True})


def configs_of(cls: type[Any]) -> Any:
    """Declare a field that holds a tuple of `cls` configs; others are named by `_target_`."""
    return field(metadata={"items": cls})


def walk_configs(path: str, cfg: Any) -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, config): `cfg` at `path`, and the configs of any class inside it."""
    yield path, cfg
    for item in fields(cfg):
        if not item.metadata.get("configs"):
            continue
        value = getattr(cfg, item.name)
        members = value.items() if isinstance(value, Mapping) else [("", value)]
        for key, part in members:
            if is_dataclass(part):
                yield from walk_configs(f"{path}.{item.name}.{key}".removesuffix("."), part)


def execution_keys(cls: type[Any], node: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield the dotted keys of `node`, a `cls` as plain data, that cannot change a result.

    A key stands for everything below it too.
    """
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
            for within in configs_in(hints[item.name]):
                yield from execution_keys(within, value, f"{key}.")


def configs_in(hint: Any) -> list[type[Any]]:
    """Return the config classes of a type hint, `X` or `X | None`."""
    return [c for c in (hint, *get_args(hint)) if is_dataclass(c) and isinstance(c, type)]


def plain(value: Any, *, target: bool = False) -> Any:
    """Return a config as data that JSON can hold; `thaw` makes the config of it again.

    Args:
        target: name the class as `_target_`; configs in fields of any class always name theirs.

    Raises:
        TypeError: `value` holds something else than numbers, strings, lists, mappings and configs.
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
    """Return the `cls` config of the data that `plain` made of it; lists become tuples.

    Raises:
        TypeError: `cls` has no field of a key's name.
    """
    hints = get_type_hints(cls)
    values = {}
    for key, value in given.items():
        within = configs_in(hints.get(key))
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
    """Return the class at import path `target`, which may be the path of an earlier release.

    Raises:
        ImportError: there is no such module.
        AttributeError: the module has no such class.
        ValueError: `target` has no dot.
    """
    module, _, name = current_path(target).rpartition(".")
    return getattr(importlib.import_module(module), name)


def refuse_no_steps(name: str, value: int | float) -> None:
    """Refuse a `value` that is neither a number of steps nor, below 1, a share of the run.

    Raises:
        ValueError: it is negative, not finite, or above 1 and no whole number.
    """
    if not 0 <= value < inf or (value > 1 and value != int(value)):
        raise ValueError(f"{name}={value} must be a number of steps, or below 1 a share of the run")


def couples_samples(cfg: Any, sequence_length: int) -> bool:
    """Return whether a sample's numbers depend on the other samples of its forward pass.

    Experts balanced over a batch couple samples, and so do scales of whole tensors. `cfg`, a model,
    branch or recipe, says so by a method `couples_samples`; without one it couples none.
    """
    own = getattr(cfg, "couples_samples", None)
    return bool(own(sequence_length)) if own is not None else False


def numerics_of(cls: type) -> int:
    """Return the `numerics` revision of config class `cls`, 1 if it has none."""
    return int(getattr(cls, "numerics", 1))


def revision(cfg: Any, model: Any) -> int:
    """Return the `numerics` revision of a config, beside `model`'s.

    By default it is that of its class; a method `numerics_with(model)` lets it depend on both.
    """
    numerics_with = getattr(cfg, "numerics_with", None)
    return int(numerics_with(model)) if numerics_with is not None else numerics_of(type(cfg))


def released_name(cls: type) -> str:
    """Return the import path of the first release of `cls`: its name in fingerprints."""
    return str(cls.__dict__.get("released_as") or released_path(_path(cls)))


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
