"""Every error, and every warning, that is told to the user in one sentence; and how a run ends by one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path


class ZeMosaicError(Exception):
    """Base of every error that is told to the user in one sentence, without a traceback."""


class UsageError(ZeMosaicError):
    """The command, a setting or the input as a whole cannot be used (exit status 2)."""


class RunError(ZeMosaicError):
    """The run failed on its way: a full disk, an unwritable output (exit status 1)."""


class Cancelled(ZeMosaicError):
    """The user stopped the run (exit status 130)."""

    def __init__(self, text: str = "the run was stopped by the user") -> None:
        super().__init__(text)


class UnusableFile(ZeMosaicError):
    """One input file cannot be used: it is set aside, and the run goes on.

    Attributes
    ----------
    path : Path
        The file.
    reason : str
        Why, in words that follow the file's name or "it" ("is empty", "has no WCS").
    """

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path.name}: {self.reason}"


class UnsolvedImage(UnusableFile):
    """An image without a WCS: no panel, but perhaps a frame. ``raw`` tells that it has a Bayer pattern."""

    def __init__(self, path: Path | str, reason: str, raw: bool = False) -> None:
        super().__init__(path, reason)
        self.raw = raw


# -------------------------------------------------------------------------------------------------------- warnings


@dataclass(frozen=True)
class Notice:
    """A warning.

    Attributes
    ----------
    text : str
        One sentence for the user.
    kind : str
        What it is about, in one word for programs ("set_aside", "gain_undetermined"); may be empty.
    subject : str
        Name of the tile, frame or file that it is about; may be empty.
    """

    text: str
    kind: str = ""
    subject: str = ""


# ------------------------------------------------------------------------------------------------- how a run ends


class ExitStatus(IntEnum):
    """What the process tells the program that started it."""

    DONE = 0
    FAILED = 1
    UNUSABLE = 2
    INTERRUPTED = 130


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit status, and the sentence for whoever started it (empty where it is done)."""

    status: ExitStatus
    sentence: str = ""


DONE = Outcome(ExitStatus.DONE)


def outcome_of(error: BaseException) -> Outcome | None:
    """What an exception that ended a run means to the user; None for an error in the program, which has a traceback."""
    match error:
        case KeyboardInterrupt() | Cancelled():
            return Outcome(ExitStatus.INTERRUPTED, "interrupted: nothing half-written was left")
        case UsageError():
            return Outcome(ExitStatus.UNUSABLE, str(error))
        case ZeMosaicError():
            return Outcome(ExitStatus.FAILED, str(error))
        case MemoryError():
            remedy = "set a smaller memory_budget (--memory-budget), or fewer num_processing_workers (--jobs)"
            return Outcome(ExitStatus.FAILED, f"there is not enough memory: {remedy}")
        case ModuleNotFoundError(name=str(name)) if name and not name.startswith("zemosaic"):
            sentence = f"the Python package {name} is missing: install zemosaic-worker with pip (see README)"
            return Outcome(ExitStatus.FAILED, sentence)
    return None
