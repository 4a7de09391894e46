"""From loosely typed values, as people and the GUI give them, to typed ones; and sizes in bytes as text.

Every ``to_*`` function returns its type or raises ValueError, whatever it is given.
"""

from __future__ import annotations

import math
import numbers
import os
import re
import reprlib

_TRUE_WORDS = frozenset({"true", "yes", "on", "1"})
_FALSE_WORDS = frozenset({"false", "no", "off", "0"})
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?i?)b?", re.IGNORECASE | re.ASCII)


def to_bool(value: object) -> bool:
    """Return a switch from a bool, 0 or 1, or a word such as yes or off."""
    if isinstance(value, str):
        word = value.strip().lower()
        if word in _TRUE_WORDS or word in _FALSE_WORDS:
            return word in _TRUE_WORDS
    elif isinstance(value, numbers.Real) and value in (0, 1):
        return bool(value)
    raise ValueError("not a switch")


def to_float(value: object) -> float:
    """Return a finite number from a number or its text."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, str)):
        raise ValueError("not a number")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError("too large") from None
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


def to_int(value: object) -> int:
    """Return a whole number from a number or its text."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    number = to_float(value)
    if not number.is_integer():
        raise ValueError("not whole")
    return int(number)


def to_str(value: object) -> str:
    """Return a text without the blanks around it."""
    if not isinstance(value, str):
        raise ValueError("not a text")
    return value.strip()


def to_path(value: object) -> str:
    """Return a path as text."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or "\0" in text:
        raise ValueError("not a path")
    return text.strip()


def to_choice(value: object, choices: tuple[str, ...]) -> str:
    """Return the one of `choices` that is meant, in whatever case; warn is WARNING."""
    word = to_str(value).lower()
    for choice in choices:
        if choice.lower() == word:
            return choice
    if word == "warn" and "WARNING" in choices:
        return "WARNING"
    raise ValueError("not a choice")


def to_pair(value: object) -> tuple[float, float]:
    """Return two numbers from a sequence or from text such as 0.9,1.1."""
    if isinstance(value, str):
        value = value.strip().strip("[]()").split(",")
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError("not a pair")
    return to_float(value[0]), to_float(value[1])


def to_gain_range(value: object) -> tuple[float, float]:
    """Return two numbers with 1 between them."""
    low, high = to_pair(value)
    if not low <= 1 <= high:
        raise ValueError("1 is not within")
    return low, high


def to_size(value: object) -> int:
    """Return a number of bytes from a number or from text: ``"2GB"`` (10^9), ``"512 MiB"`` (2^20), ``"800m"``, ``"4096"``."""
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match is None or match[2].lower() not in _UNITS:
            raise ValueError("not a size")
        unit = _UNITS[match[2].lower()]
        # Whole numbers stay exact; a float would lose bytes above 2**53.
        return int(match[1]) * unit if match[1].isdigit() else round(to_float(to_float(match[1]) * unit))
    size = to_int(value)
    if size < 0:
        raise ValueError("not a size")
    return size


def format_size(size: int) -> str:
    """Write a number of bytes in the largest unit that keeps it exact, as `to_size` reads it."""
    for suffix, unit in sorted(_UNITS.items(), key=lambda item: -item[1]):
        if size >= unit and size % unit == 0:
            return f"{size // unit}{suffix.upper().replace('I', 'i')}{'B' if suffix else ''}"
    return str(size)


def show(value: object) -> str:
    """Write a value for a message: short whatever it is."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of more digits than Python writes out
        return f"a {type(value).__name__} with thousands of digits"
