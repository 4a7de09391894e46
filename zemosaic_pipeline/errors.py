"""Every error that is told to the user in one sentence."""

from __future__ import annotations

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
        Why, in words that follow the file's name ("is empty").
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
