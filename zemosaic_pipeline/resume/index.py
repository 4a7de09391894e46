"""The files of a folder of checkpoints, which only grow: lines of the index, and the bytes of the pieces.

- ``index``: one line a record, appended by a single write and never changed: a checksum of the line, and JSON. A line
  that a crash cut short, or that is damaged, counts as not written. Later lines replace earlier ones.
- ``pieces``: small pieces, one behind the other; the index knows place, size and digest of each.

Plain files that only grow need no database, survive a kill at any moment, and work on network disks. A full disk costs
the piece, not the run.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from zemosaic_pipeline.resume.fingerprint import FORMAT

Tell = Callable[[str, str], object]
Record = dict[str, Any]


class Index:
    """Records by step and key, as the folder holds them and as this run adds to them. Safe to use from many threads.

    Parameters
    ----------
    folder : Path
        Made when there is something that it is worth it for.
    tell : callable
        ``tell(level, text)``, level "INFO" or "WARN".

    Attributes
    ----------
    records : dict
        By (step, key).
    lock : threading.RLock
        Held by whoever reads or changes the records.
    """

    def __init__(self, folder: Path, tell: Tell) -> None:
        self.folder = folder
        self.records: dict[tuple[str, str], Record] = {}
        self.lock = threading.RLock()
        self._tell = tell
        self._held: list[str] = []
        self._full = False
        self._handles: tuple[int, int] | None = None  # of the index and of the pieces
        self._end = 0

    def append(self, step: str, key: str, record: Record | None, hold: bool = False) -> None:
        """Write a line, None for "forget the step"; with ``hold`` it waits until the folder is made for another."""
        with self.lock, self._unhindered(step, key):
            if record is not None:
                self.records[step, key] = record
            if self._full:
                return
            self._held.append(index_line({"step": step, "key": key, **(record or {"forget": True})}))
            if hold and self._handles is None:
                return
            lines, self._held = "".join(self._held).encode(), []
            _write_all(self._opened()[0], lines)

    def append_piece(self, step: str, key: str, data: bytes, record: Record) -> None:
        """Keep the bytes of a piece, and then its record with their place."""
        with self.lock, self._unhindered(step, key):
            if self._full:
                return
            pieces = self._opened()[1]
            offset, self._end = self._end, self._end + len(data)
            _write_all(pieces, data)
            self.append(step, key, {**record, "offset": offset, "size": len(data)})

    def piece(self, record: Record) -> bytes:
        """The bytes of a piece; none where they cannot be read."""
        try:
            with (self.folder / "pieces").open("rb") as stream:
                stream.seek(record["offset"])
                return stream.read(record["size"])
        except OSError:
            return b""

    def close(self) -> None:
        with self.lock:
            for handle in self._handles or ():
                os.close(handle)
            self._handles = None

    @contextmanager
    def _unhindered(self, step: str, key: str) -> Iterator[None]:
        """A disk that takes no more costs the piece, and all that follow, but not the run."""
        try:
            yield
        except OSError as error:
            self._full = True
            reason = error.strerror or error
            self._tell("INFO", f"resume: {step} of {key} and what follows is not kept for a resume ({reason})")

    def _opened(self) -> tuple[int, int]:
        """Handles of the files, open for appending; where the folder is new, it is made."""
        if self._handles is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
            pieces = os.open(self.folder / "pieces", flags, 0o666)
            self._end = os.fstat(pieces).st_size
            lines = os.open(self.folder / "index", flags, 0o666)
            self._handles = lines, pieces
            # a line that a kill has cut short must not swallow the next one
            head = index_line({"format": FORMAT}) if os.fstat(lines).st_size == 0 else "\n"
            _write_all(lines, head.encode())
        return self._handles


def read_index(folder: Path, tell: Tell) -> Index | None:
    """What an earlier run has left; where that is of no use, an empty index, and it is said.

    None where a thing of that name can neither be used nor replaced: nothing can be kept.
    """
    index = Index(folder, tell)
    if not os.path.lexists(folder):
        return index
    rows, why = _rows_of(folder, tell)
    if why:
        tell("INFO", f"resume: {folder} {why}; the run starts afresh")
        if not remove(folder) and (not folder.is_dir() or os.path.lexists(folder / "index")):
            tell("INFO", f"resume: {folder} cannot be removed; nothing is kept for a resume")
            return None
    for row in rows:
        step, key = row.pop("step", ""), row.pop("key", "")
        if row.get("forget"):
            index.records = {place: r for place, r in index.records.items() if place[0] != step}
        elif "print" in row:
            index.records[step, key] = row
    return index


def _rows_of(folder: Path, tell: Tell) -> tuple[list[Record], str]:
    """The records in a folder, in order, or why they are of no use."""
    try:
        lines = (folder / "index").read_bytes().split(b"\n")
    except FileNotFoundError:
        lines = []
    except OSError as error:
        return [], f"cannot be read ({error.strerror or error})"
    rows = [row for row in map(parsed_line, lines) if row is not None]
    if not rows or rows[0].get("format") != FORMAT:
        return [], "was not left by this version"
    torn = sum(1 for line in lines if line) - len(rows)
    if torn:
        tell("INFO", f"resume: {torn} damaged lines of the index are passed over")
    return rows[1:], ""


def remove(folder: Path) -> bool:
    """Remove a folder of checkpoints, but nothing in it that is not ours; tells whether it is gone."""
    with suppress(OSError):
        for path in [folder / "index", folder / "pieces", *folder.glob("*.part")]:
            path.unlink(missing_ok=True)
        folder.rmdir()
    return not os.path.lexists(folder)


def index_line(record: Record) -> str:
    """A record as a line: checksum, JSON."""
    text = json.dumps(record)
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def parsed_line(line: bytes) -> Record | None:
    """A line of the index; None where it is damaged."""
    crc, _, text = line.partition(b" ")
    if not text or crc != b"%08x" % zlib.crc32(text):
        return None
    return json.loads(text)


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
