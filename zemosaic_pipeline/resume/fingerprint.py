"""What the bits of a piece depend on, as a fingerprint: the program, the settings that act in its step, its inputs.

`resume.checkpoints` uses it to tell whether what a stopped run has left belongs to the run at hand.
"""

from __future__ import annotations

import functools
import hashlib
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import numpy as np

from zemosaic_pipeline.settings.fields import STEPS, Value
from zemosaic_pipeline.settings.settings import SETTINGS, Settings

#: Changes with what the pieces look like.
FORMAT = 1
#: Packages whose versions may change a bit of the result.
LIBRARIES = (
    "zemosaic-worker",
    "numpy",
    "numba",
    "scipy",
    "astropy",
    "reproject",
    "sep",
    "opencv-python-headless",
    "numba-cuda",
)


def settings_of(step: str, settings: Settings) -> dict[str, Value]:
    """The settings that act in a step, by name.

    Raises
    ------
    ValueError
        There is no such step: its pieces would outlive every change of a setting.
    """
    if step not in STEPS:
        raise ValueError(f"{step!r} is no step that a setting can act in: {', '.join(STEPS)}")
    return {row.key: getattr(settings, row.key) for row in SETTINGS if step in row.acts_in}


def fingerprint(step: str, settings: Settings, *parts: object) -> str:
    """Digest of what a piece of ``step`` depends on, 32 hexadecimal digits.

    Parameters
    ----------
    step : str
        One of `settings.fields.STEPS`.
    settings : Settings
        Those that act in the step are taken.
    *parts
        Tokens of inputs and results of earlier steps: texts, numbers, None, bytes, arrays, and sequences of them.

    Raises
    ------
    TypeError
        A part is of another kind.
    ValueError
        There is no such step.
    """
    digest = hashlib.blake2b(digest_size=16)
    _absorb(digest, [FORMAT, program(), step, sorted(settings_of(step, settings).items()), parts])
    return digest.hexdigest()


def _absorb(digest: hashlib.blake2b, value: object) -> None:
    """Feed a value into a digest so that different values give different bytes."""
    if isinstance(value, np.ndarray):
        digest.update(f"array {value.dtype.str} {value.shape};".encode())
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    elif isinstance(value, bytes):
        digest.update(b"bytes %d;" % len(value) + value)
    elif isinstance(value, list | tuple):
        digest.update(b"list %d;" % len(value))
        for item in value:
            _absorb(digest, item)
    elif value is None or isinstance(value, str | bool | int | float):
        text = repr(value.item() if isinstance(value, np.generic) else value)
        digest.update(f"{len(text)} {text};".encode("utf-8", "backslashreplace"))
    else:
        raise TypeError(f"a fingerprint cannot be made of an object of type {type(value).__name__}")


def program_files() -> list[Path]:
    """The program's modules, in order; none in a frozen build, which holds no sources."""
    package = Path(__file__).parents[1]
    top = [package.parent / f"zemosaic_{name}.py" for name in ("photometry", "utils", "worker")]
    return [path for path in [*top, *sorted(package.rglob("*.py"))] if path.is_file()]


@functools.cache
def program() -> str:
    """Digest of the program's modules and of the versions of what it uses."""
    digest = hashlib.blake2b(digest_size=16)
    for path in program_files():
        digest.update(path.name.encode() + hashlib.blake2b(path.read_bytes()).digest())
    versions = [platform.python_version(), platform.system(), platform.machine()]
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    digest.update("\n".join(versions).encode())
    return digest.hexdigest()
