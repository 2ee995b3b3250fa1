"""What a config is: a frozen, keyword-only dataclass that refuses unknown keys.

Beside its fields a config class may carry
    numerics   an integer, raised when the numbers its class produces change: part of the fingerprint
    neutral(v) metadata of a field added later: at `v` the field does not count in the fingerprint
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any, TypeVar, cast, dataclass_transform, get_args, get_type_hints

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def config(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass that pydantic validates with extra keys forbidden."""
    cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    if "numerics" not in cls.__dict__:
        cls.numerics = 1  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True)(cls)


def neutral(value: Any) -> Any:
    """Declare a field added after its class was first used: default `value`, not hashed there."""
    return field(default=value, metadata={"neutral": value})


def thaw(cls: type[T], plain: Mapping[str, Any]) -> T:
    """Return the config that `dataclasses.asdict` made plain, JSON's lists as tuples.

    Raises:
        TypeError: a key that the class does not have.
    """
    hints = get_type_hints(cls)
    values = {}
    for key, value in plain.items():
        inner = [c for c in (hints.get(key), *get_args(hints.get(key))) if is_dataclass(c)]
        if isinstance(value, Mapping) and inner:
            value = thaw(cast(type[Any], inner[0]), value)
        values[key] = tuple(value) if isinstance(value, list) else value
    return cls(**values)
