"""What surrounds a run: its output folder, its log, temporary files, the program's version."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

from zemosaic_pipeline.errors import UsageError, ZeMosaicError, outcome_of
from zemosaic_pipeline.files import not_written
from zemosaic_pipeline.settings.settings import SETTINGS, Settings

#: Begin of the names of scratch folders; the process number follows.
SCRATCH_PREFIX = ".zemosaic_tmp_"
#: Names of our unfinished files (`files.atomic_path`).
UNFINISHED = re.compile(r"\.(zemosaic_|run_report|resource_telemetry|worker_last_state).*\.\d+\.part")
#: Where Windows locks the log, far beyond its end.
LOCKED_BYTE = 1 << 30


def prepare_output(folder: Path) -> Path:
    """The output folder, made and proved writable.

    Raises
    ------
    UsageError
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"the output folder {folder} cannot be written ({reason}): choose another one") from error
    return folder


class LogHandler(logging.FileHandler):
    """The log file. A line that cannot be written, on a full disk, is not worth the run or a traceback."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Go on without the line."""


@contextmanager
def log_file(path: Path, level: str) -> Iterator[logging.Logger]:
    """A logger that writes this run's log file, and nothing after.

    The log is the sign that a run is at work in its folder: see :func:`only_run`.
    """
    with only_run(path):
        remove_leftovers(path.parent)
        with _logger(path, level) as logger:
            yield logger


@contextmanager
def _logger(path: Path, level: str) -> Iterator[logging.Logger]:
    logger = logging.Logger(path.stem, level)
    try:
        handler = LogHandler(path, mode="w", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise not_written(path, error) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    logger.addHandler(handler)
    try:
        yield logger
    except BaseException as error:
        if (outcome := outcome_of(error)) is None:
            logger.critical("%s", traceback.format_exc())
        else:
            logger.error("%s", outcome.sentence)
            told = isinstance(error, ZeMosaicError | KeyboardInterrupt)  # of others, somebody may want to know where
            logger.log(logging.DEBUG if told else logging.ERROR, "%s", traceback.format_exc())
        raise
    finally:
        with suppress(OSError):  # what is left to write of the log, on a full disk
            handler.close()


@contextmanager
def only_run(path: Path) -> Iterator[None]:
    """Hold a lock of the system on a file: it goes with the process, however that ends.

    Raises
    ------
    UsageError
        Another run holds it.
    RunError
        The file cannot be written.
    """
    try:
        stream = path.open("ab")
    except OSError as error:
        raise not_written(path, error) from error
    with stream:
        if not _locked(stream.fileno()):
            raise UsageError(
                f"another run is writing to {path.parent}: wait for its end, stop it, or choose another output folder"
            )
        yield


def _locked(handle: int) -> bool:
    """Lock an open file; False where another process or thread has locked it."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(handle, LOCKED_BYTE, os.SEEK_SET)  # nobody reads there: the log stays readable
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # a disk without locks is no reason not to run
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
    return True


def remove_leftovers(output: Path) -> None:
    """Remove the temporary files of killed runs into ``output``, where this is the only run."""
    for path in output.glob(f"{SCRATCH_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in output.glob(".*.part"):
        if UNFINISHED.fullmatch(path.name):
            with suppress(OSError):
                path.unlink()


def log_start(logger: logging.Logger, source: Path, output: Path, settings: Settings) -> None:
    """What ran, on what, and with which settings."""
    logger.info("zemosaic-worker %s, Python %s", program_version(), sys.version.split()[0])
    logger.info("input %s, output %s", source.absolute(), output.absolute())
    for row in SETTINGS:
        if (value := getattr(settings, row.key)) != row.default:
            logger.info("setting %s = %s", row.key, value)


@contextmanager
def scratch_folder(output: Path, settings: Settings) -> Iterator[Path]:
    """A folder for temporary files, removed at the end whatever happened."""
    parent = Path(settings.coadd_memmap_dir) if settings.coadd_memmap_dir else output
    # runs into other folders may be at work in the same parent; one into this folder was killed
    mine = hashlib.blake2b(os.fsencode(output.resolve()), digest_size=4).hexdigest()
    for old in parent.glob(f"{SCRATCH_PREFIX}*_{mine}_*"):
        shutil.rmtree(old, ignore_errors=True)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{os.getpid()}_{mine}_", dir=parent))
    except OSError as error:
        raise UsageError(
            f"coadd_memmap_dir {parent} cannot be written ({error.strerror}): choose another folder"
        ) from error
    try:
        yield folder
    finally:
        if settings.cleanup_temp_artifacts:
            shutil.rmtree(folder, ignore_errors=True)


def remove_temporary(folders: Iterable[Path], scratch: bool = True) -> None:
    """Remove the unfinished files and scratch folders of this process, for an end that runs no ``finally``.

    They bear the process number (`files.atomic_path`, `scratch_folder`), so that nothing of another run is
    touched. What cannot be removed, because the system has it open, stays.

    Parameters
    ----------
    folders : iterable of Path
        Searched with all that lies below; those that are missing are passed over.
    scratch : bool
        Whether scratch folders go too.
    """
    number = os.getpid()
    for folder in folders:
        for root, _, names in os.walk(folder):  # other threads may still remove: it passes over what has gone
            for name in names:
                if name.startswith(".") and name.endswith(f".{number}.part"):
                    with suppress(OSError):
                        Path(root, name).unlink()
        for path in folder.glob(f"{SCRATCH_PREFIX}{number}_*") if scratch else ():
            shutil.rmtree(path, ignore_errors=True)


def program_version() -> str:
    """Version of the installed program; ``source`` where its files were only copied."""
    try:
        return metadata.version("zemosaic-worker")
    except metadata.PackageNotFoundError:
        return "source"
