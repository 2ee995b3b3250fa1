"""What a config is: a frozen, keyword-only dataclass that refuses unknown keys.

Beside its fields a config class may carry
    numerics   an integer, raised when the numbers its class produces change: part of the fingerprint
    neutral(v) metadata of a field added later: at `v` the field does not count in the fingerprint
"""

from dataclasses import dataclass, field
from typing import Any, TypeVar, dataclass_transform

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
