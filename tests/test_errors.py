"""zemosaic_pipeline.errors: how a run ends, for the command line, the window and the log alike."""

from __future__ import annotations

import pytest

from zemosaic_pipeline.errors import (
    Cancelled,
    ExitStatus,
    Outcome,
    RunError,
    UnusableFile,
    UsageError,
    ZeMosaicError,
    outcome_of,
)


class FinerUsageError(UsageError):
    """An error of a kind that may come one day."""


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UsageError("no tiles"), 2, ["no tiles"]),
        (FinerUsageError("no tiles"), 2, ["no tiles"]),
        (RunError("disk full"), 1, ["disk full"]),
        (ZeMosaicError("odd"), 1, ["odd"]),
        (UnusableFile("in/a.fits", "is empty"), 1, ["a.fits: is empty"]),
        (MemoryError(), 1, ["memory_budget", "--memory-budget", "num_processing_workers", "--jobs"]),
        (ModuleNotFoundError("gone", name="numba"), 1, ["package numba is missing", "install"]),
        (ModuleNotFoundError("gone", name="reproject.mosaicking"), 1, ["reproject.mosaicking", "install"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
        (Cancelled("stopped"), 130, ["interrupted"]),
    ],
)
def test_what_is_told(error, status, words):
    outcome = outcome_of(error)
    assert outcome.status == status and all(word in outcome.sentence for word in words)


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("a mistake"),
        SystemExit(0),
        ImportError("cannot import name"),
        ModuleNotFoundError("gone"),
        ModuleNotFoundError("gone", name="zemosaic_photometry"),
        ModuleNotFoundError("gone", name="zemosaic_pipeline.resample.placed"),
    ],
)
def test_an_error_in_the_program_is_no_sentence(error):
    assert outcome_of(error) is None


def test_ctrl_c_and_cancelled_are_one_end():
    assert outcome_of(KeyboardInterrupt()) == outcome_of(Cancelled("the run was stopped by the user"))
    assert outcome_of(Cancelled("")).status is ExitStatus.INTERRUPTED != Outcome(ExitStatus.DONE).status
