"""Dataclasses as plain JSON data, and JSON that nobody vouches for checked before it is believed.

1. `to_plain` writes a dataclass as an object of its fields; `from_plain` reads it back, each field checked
   against its annotation. The annotations are the format: nothing else lists the fields or their types.
2. The other checks take an object and the name of a field and return the value.

All raise what `results.files` and `results.journal_lines` take for `DAMAGE`: `KeyError` for a missing field,
`TypeError`, `ValueError` and `OverflowError` for a wrong one.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import IntEnum
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

DAMAGE = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What is raised where data does not hold what it should."""


def damage(error: BaseException) -> str:
    """A `DAMAGE` in words."""
    return f"lacks {error}" if isinstance(error, KeyError) else str(error)


def to_plain(value: Any) -> Any:
    """The value as `json` can write it; what has a `to_json` of its own is written by that.

    A number that is not finite, which JSON has not, is None.
    """
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value):
        return plain_fields(value)
    if hasattr(value, "tolist"):  # a tensor or an array
        return to_plain(value.tolist())
    if isinstance(value, Mapping):
        return {name: to_plain(entry) for name, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return int(value) if isinstance(value, IntEnum) else value


def plain_fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass, each by `to_plain`; for a `to_json` that adds to them."""
    return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}


def from_plain(kind: type[T], data: Any, **ready: Any) -> T:
    """The dataclass that `to_plain` wrote.

    Keys that are no fields are a later version's and are passed over; a field with a default may be missing.

    Args:
        kind: The dataclass. Its fields may be strings, whole and finite numbers, booleans, `Literal`s,
            `IntEnum`s, tuples and mappings of these, dataclasses, classes with a `from_json`, or None.
        data: What was read.
        **ready: Fields that do not come from `data`, by name.
    """
    if not isinstance(data, dict):
        raise TypeError(f"{kind.__name__} is a {type(data).__name__}, expected an object")
    hints = get_type_hints(kind)
    for field in fields(kind):  # pyright: ignore[reportArgumentType]
        optional = (field.default, field.default_factory) != (MISSING, MISSING)
        if field.name not in ready and (field.name in data or not optional):
            ready[field.name] = _read(hints[field.name], data[field.name], field.name)
    return kind(**ready)


def _read(kind: Any, data: Any, name: str) -> Any:
    """One value of a field called `name`, checked against its annotation."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        present = [other for other in inner if other is not NoneType]
        return None if data is None and NoneType in inner else _read(present[0], data, name)
    if origin is Literal:
        if data not in inner:
            raise ValueError(f"{name} is {str(data)[:40]!r}, expected one of {inner}")
        return data
    if origin is tuple:
        return tuple(_read(inner[0], entry, name) for entry in _expect(list, data, name))
    if origin is not None:
        return {key: _read(inner[1], entry, name) for key, entry in _expect(dict, data, name).items()}
    if hasattr(kind, "from_json"):
        return kind.from_json(data)
    if is_dataclass(kind):
        return from_plain(kind, data)  # pyright: ignore[reportArgumentType]
    if issubclass(kind, IntEnum):
        return kind(data)
    if kind is float:
        value = float(data if type(data) is int else _expect(float, data, name))
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}, expected a finite number")
        return value
    return _expect(kind, data, name)


def _expect(kind: type, data: Any, name: str) -> Any:
    if type(data) is not kind:  # True is not a number here
        raise TypeError(f"{name} is a {type(data).__name__}, expected a {kind.__name__}")
    return data


def text(data: Mapping[str, Any], name: str) -> str:
    """A string that can be written as UTF-8."""
    value = data[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a string")
    value.encode()  # half a character is refused here, with a ValueError
    return value


def text_or_none(data: Mapping[str, Any], name: str) -> str | None:
    """The same, or None where the field is null or missing."""
    return None if data.get(name) is None else text(data, name)


def count(data: Mapping[str, Any], name: str) -> int:
    """A whole number from 0 on that 63 bits can hold."""
    value = data[name]
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{name} is {str(value)[:40]}, expected a count")
    return value


def number(data: Mapping[str, Any], name: str) -> float:
    """A finite number; null is NaN."""
    check_numbers([data[name]])
    return none_to_nan(data[name])


def none_to_nan(value: float | None) -> float:
    """A number that `to_plain` wrote, read back."""
    return math.nan if value is None else float(value)


def check_numbers(values: Any) -> None:
    """Refuse what is not a list of finite numbers and nulls; JSON's 1e999 is infinite."""
    if not isinstance(values, list) or not set(map(type, values)) <= {int, float, type(None)}:
        raise TypeError(f"{str(values)[:60]}: expected numbers and null only")
    if any(value is not None and not abs(value) <= sys.float_info.max for value in values):
        raise ValueError("a number is beyond what a float can hold")
