"""The FITS files of a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from zemosaic_pipeline.errors import UsageError

EXCLUDED_DIRS: frozenset[str] = frozenset({"unaligned_by_zemosaic"})
"""Names of folders whose content is never an input."""


def is_path_excluded(path: Path | str, excluded_dirs: Iterable[str] | None = None) -> bool:
    """Tell whether any part of `path` bears the name of an excluded folder (in any case).

    Parameters
    ----------
    path : Path or str
        A file or a folder; it need not exist.
    excluded_dirs : iterable of str, optional
        Names of folders; default `EXCLUDED_DIRS`.
    """
    names = EXCLUDED_DIRS if excluded_dirs is None else excluded_dirs
    return not {str(name).casefold() for name in names}.isdisjoint(p.casefold() for p in Path(path).parts)


_FITS_NAME = re.compile(r"\.(fits?|fts)(\.(fz|gz))*$|\.fz$", re.IGNORECASE)


@dataclass(frozen=True)
class SetAside:
    """A file (or folder) of the input that is not used.

    Attributes
    ----------
    name : str
        Path relative to the input folder, with forward slashes.
    reason : str
        Why, in words that follow the name.
    """

    name: str
    reason: str


def find_fits_files(folder: Path | str, problems: list[SetAside] | None = None) -> list[Path]:
    """Find the FITS files below `folder`, sorted by path.

    ``.fit``, ``.fits``, ``.fts`` in any case, also with ``.fz`` or ``.gz`` behind, and plain ``.fz``. Hidden
    files and folders (unfinished output, other systems' leftovers) and the folders of `EXCLUDED_DIRS` are
    passed over; links are followed.

    Parameters
    ----------
    folder : Path or str
        The input folder.
    problems : list of SetAside, optional
        Folders that cannot be read are appended.

    Raises
    ------
    UsageError
        `folder` is missing, no folder, or cannot be read.
    """
    folder = require_folder(Path(folder))

    def report(error: OSError) -> None:
        if problems is not None:
            name = Path(error.filename).relative_to(folder).as_posix()
            problems.append(SetAside(name, f"is a folder that cannot be read ({error.strerror})"))

    found: list[Path] = []
    seen: set[Path] = set()
    for root, folders, files in os.walk(folder, onerror=report, followlinks=True):
        here = Path(root)
        if here.resolve() in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(here.resolve())
        folders[:] = sorted(d for d in folders if d[0] != "." and not is_path_excluded(d))
        found += [here / name for name in files if name[0] != "." and _FITS_NAME.search(name)]
    return sorted(found)


def require_folder(folder: Path) -> Path:
    """The input folder, proved readable; `UsageError` where it is missing, no folder, or cannot be read."""
    if not folder.exists():
        raise UsageError(f"The input folder {folder} does not exist.")
    if not folder.is_dir():
        raise UsageError(f"The input {folder} is not a folder; give the folder that holds the FITS files.")
    try:
        next(folder.iterdir(), None)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"The input folder {folder} cannot be read ({reason}).") from error
    return folder
