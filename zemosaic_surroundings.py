"""What surrounds a run: its folders, its log, temporary files, the machine's threads, the program's version."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import traceback
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

from zemosaic_settings import SETTINGS, Settings
from zemosaic_utils import UsageError, ZeMosaicError, not_written


def usable_input(folder: Path, settings: Settings) -> Path:
    """The input folder, proved readable before anything is made.

    Raises
    ------
    UsageError
    """
    from zemosaic_scan import require_folder

    if settings.use_existing_master_tiles is False:
        raise UsageError(
            "use_existing_master_tiles = false asks for Phases 1 to 3 (raw subs), which this version does not have: "
            "give a folder of plate-solved panels, and --tiles."
        )
    require_folder(folder)
    return folder


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
def log_file(path: Path, level: str):
    """A logger that writes this run's log file, and nothing after."""
    logger = logging.Logger(path.stem, level)
    try:
        handler = LogHandler(path, mode="w", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise not_written(path, error) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    logger.addHandler(handler)
    try:
        yield logger
    except ZeMosaicError as error:
        logger.error("%s", error)
        logger.debug("%s", traceback.format_exc())
        raise
    except KeyboardInterrupt:
        logger.error("interrupted")
        raise
    except BaseException:
        logger.critical("%s", traceback.format_exc())
        raise
    finally:
        with suppress(OSError):  # what is left to write of the log, on a full disk
            handler.close()


def log_start(logger: logging.Logger, source: Path, output: Path, settings: Settings) -> None:
    """What ran, on what, and with which settings."""
    logger.info("zemosaic-worker %s, Python %s", program_version(), sys.version.split()[0])
    logger.info("input %s, output %s", source.absolute(), output.absolute())
    for row in SETTINGS:
        if (value := getattr(settings, row.key)) != row.default:
            logger.info("setting %s = %s", row.key, value)


@contextmanager
def scratch_folder(output: Path, settings: Settings):
    """A folder for temporary files, removed at the end whatever happened."""
    parent = Path(settings.coadd_memmap_dir) if settings.coadd_memmap_dir else output
    try:
        folder = Path(tempfile.mkdtemp(prefix=".zemosaic_tmp_", dir=parent))
    except OSError as error:
        raise UsageError(
            f"coadd_memmap_dir {parent} cannot be written ({error.strerror}): choose another folder"
        ) from error
    try:
        yield folder
    finally:
        if settings.cleanup_temp_artifacts:
            shutil.rmtree(folder, ignore_errors=True)


def worker_count(settings: Settings) -> int:
    """Threads for the work on pixels."""
    if settings.num_processing_workers > 0:
        return settings.num_processing_workers
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def program_version() -> str:
    """Version of the installed program; ``source`` where its files were only copied."""
    try:
        return metadata.version("zemosaic-worker")
    except metadata.PackageNotFoundError:
        return "source"
