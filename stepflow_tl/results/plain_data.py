"""Fields of JSON that nobody vouches for, checked one by one before they are believed.

Each check takes the object and the name of a field and returns the value, or raises what `results.journal`
takes for a damaged line: `KeyError` for a missing field, `TypeError` and `ValueError` for a wrong one.
"""

import math
import sys
from collections.abc import Mapping
from typing import Any


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
    return math.nan if data[name] is None else float(data[name])


def check_numbers(values: Any) -> None:
    """Refuse what is not a list of finite numbers and nulls; JSON's 1e999 is infinite."""
    if not isinstance(values, list) or not set(map(type, values)) <= {int, float, type(None)}:
        raise TypeError(f"{str(values)[:60]}: expected numbers and null only")
    if any(value is not None and not abs(value) <= sys.float_info.max for value in values):
        raise ValueError("a number is beyond what a float can hold")
