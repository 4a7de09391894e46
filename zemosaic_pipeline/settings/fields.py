"""One setting as a row of the table, and how a loosely typed value becomes its type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, get_args

from zemosaic_pipeline.errors import UsageError
from zemosaic_pipeline.settings.values import (
    show,
    to_bool,
    to_choice,
    to_float,
    to_gain_range,
    to_int,
    to_pair,
    to_path,
    to_size,
    to_str,
)

#: Steps of a run whose results a later run can use.
Step: TypeAlias = Literal["frame", "solve", "stack", "survey", "photometry", "science", "aesthetic"]
STEPS: tuple[Step, ...] = get_args(Step)
MOSAICS: tuple[Step, ...] = ("science", "aesthetic")
#: All that is made of the pixels of a tile.
OF_TILES: tuple[Step, ...] = ("survey", "photometry", *MOSAICS)

#: What a setting can be.
Value: TypeAlias = bool | int | float | str | tuple[float, float] | None

_AUTO_WORDS = frozenset({"", "auto", "none", "null"})
_KINDS: dict[str, tuple[Callable[[object], Value], str]] = {
    "bool": (to_bool, "true or false"),
    "int": (to_int, "a whole number"),
    "float": (to_float, "a number"),
    "str": (to_str, "a text"),
    "path": (to_path, "a path"),
    "pair": (to_pair, "two numbers such as 0.05,0.05, each"),
    "gain range": (to_gain_range, "two numbers such as 0.9,1.1 with 1 between them, each"),
    "size": (to_size, "a size such as 500MB or 2GB, at least 64MB"),
}


@dataclass(frozen=True)
class Setting:
    """One setting of the worker, as a row of the table.

    Attributes
    ----------
    key : str
        Name, as in the GUI's configuration where that has it.
    kind : str
        ``bool``, ``int``, ``float``, ``str``, ``path``, ``choice``, ``pair`` (two floats), ``gain range``
        (two floats, low <= 1 <= high) or ``size`` (bytes).
    default : object
        Value on the command line; None where the worker finds it out by itself ("auto").
    unit, meaning : str
        For the reader.
    choices : tuple of str
        Allowed values of a ``choice``.
    low, high : float or None
        Inclusive range of a number, or of both numbers of a pair.
    in_gui : bool
        Whether the GUI's configuration has this key.
    gui_default : object
        Its default there, where it is another one.
    acts_in : tuple of str
        The `STEPS` whose result depends on the setting by itself, so that it is part of their fingerprints: another
        value makes them again. Empty where nothing that is kept depends on it, or only through what an earlier step
        found, which is part of the fingerprint by its own value (the frames of a panel, the output grid, the size of
        the photometry's cells, the name of the backend).

    Raises
    ------
    ValueError
        `acts_in` names a step that there is not.
    """

    key: str
    kind: str
    default: Value
    unit: str = ""
    meaning: str = ""
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    in_gui: bool = True
    gui_default: Value = None
    acts_in: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        if unknown := set(self.acts_in) - set(STEPS):
            raise ValueError(f"setting {self.key} acts in unknown steps: {', '.join(sorted(unknown))}")

    @property
    def optional(self) -> bool:
        """Whether "auto" (None) is a value of its own."""
        return self.default is None

    def allowed(self) -> str:
        """What may be given, as the end of the sentence "expected ..."."""
        if self.kind == "choice":
            text = "one of " + ", ".join(self.choices)
        else:
            text = _KINDS[self.kind][1]
            if self.low is not None and self.kind != "size":
                text += f" from {self.low:g} to {self.high:g}"
        return text + (", or auto" if self.optional else "")

    def coerce(self, value: object, source: str) -> Value:
        """Return `value` as this setting's type; None means the default.

        Raises
        ------
        UsageError
            Names the key, the value and what is allowed.
        """
        if value is None:
            return self.default
        if self.optional and isinstance(value, str) and value.strip().lower() in _AUTO_WORDS:
            return None
        try:
            result = to_choice(value, self.choices) if self.kind == "choice" else _KINDS[self.kind][0](value)
            self._check_range(result)
        except ValueError:
            raise UsageError(
                f"Setting {self.key} = {show(value)} ({source}) cannot be used: expected {self.allowed()}."
            ) from None
        return result

    def _check_range(self, value: Value) -> None:
        if self.low is None or self.high is None:
            return
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int | float) or not self.low <= number <= self.high:
                raise ValueError("out of range")


class _Row(TypedDict, total=False):
    """Attributes of a `Setting` that not every row names."""

    kind: str
    unit: str
    choices: tuple[str, ...]
    low: float
    high: float
    gui_default: Value


def setting(
    default: Value, meaning: str, *, acts_in: tuple[Step, ...], ours: bool = False, **more: Unpack[_Row]
) -> Any:
    """Declare a dataclass field that is a row of the table; the kind follows from the default.

    Parameters
    ----------
    default, meaning, acts_in, **more
        Attributes of its `Setting`.
    ours : bool
        The GUI's configuration has it not.
    """
    guess = "choice" if "choices" in more else "pair" if isinstance(default, tuple) else type(default).__name__
    row = {"default": default, "kind": guess, "meaning": meaning, "acts_in": acts_in, "in_gui": not ours, **more}
    return field(default=default, metadata=row)
