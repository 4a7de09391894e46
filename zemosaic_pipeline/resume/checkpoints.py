"""What a stopped, killed or crashed run leaves for the next one with the same input and settings.

A folder ``resume.checkpoints`` in OUTPUT_DIR exists from the first finished piece of a run to its successful end (and
beyond it with ``cache_retention = keep``). It holds

- ``index``: one line a record, appended by a single write and never changed: a checksum of the line, and JSON. A line
  that a crash cut short, or that is damaged, counts as not written. Later lines replace earlier ones.
- ``pieces``: small pieces, one behind the other; the index knows place, size and digest of each.
- ``files/``: large pieces, one file each, renamed into place when complete.
- ``science.part`` and so on: mosaics in the making; the index knows the checksum of every finished block.

Plain files that only grow need no database, survive a kill at any moment, and work on network disks.

Nothing here is ever an obstacle. What cannot be read, is damaged, or belongs to another input, other settings or
another version of the program is named in the log and made again, it alone; a full disk costs the piece, not the run.

What belongs together
---------------------
Each piece bears a *fingerprint*: a digest of everything that its bits depend on. That is the program (the content of
its modules), the versions of the libraries, the settings whose rows name its step (`settings.settings.SETTINGS`), the *tokens* of the
inputs, and what earlier steps found. Threads, memory budget and preview settings are not in it, since no bit depends on
them; the name of the backend is, since CPU and GPU differ in the seventh digit.

An input's token is a random name that it gets when it is first seen. It keeps it as long as it is *the same file*:

- path, size and modification time are the same, and so is the time of the last change of its inode (on systems that
  have one: a file whose pixels were changed and whose time was set back is noticed there);
- where one of the times differs, or the modification time was less than 2 s old when the file was recorded, the file
  is in doubt, and its content decides (blake2b). Digests are made by a background thread once a run has lasted 5 s, at
  a quarter of one core's time at most; where there is none yet, the file counts as changed;
- with ``resume = force`` the content alone decides, wherever the file lies now and whatever its times say. A file whose
  digest had not been made when the run was stopped is judged as with ``auto``.

What ``auto`` cannot see: a file rewritten with the same size and its modification time set back, on a system without
inode times (Windows), or through a network share that does not pass them on. Use ``resume = off`` after such a thing.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from zemosaic_pipeline.errors import RunError, UsageError
from zemosaic_pipeline.files import bytes_digest, file_digest
from zemosaic_pipeline.resume.fingerprint import FORMAT
from zemosaic_pipeline.settings.settings import Settings

FOLDER = "zemosaic_resume"
#: A file whose modification time is less than this before the moment it was recorded could change unseen.
UNSETTLED_NS = 2_000_000_000
#: Digests of the inputs begin when a run has lasted so long, in seconds: a short run is made again as fast.
DIGESTS_AFTER = 5.0
#: Idle time after each piece of a digest, in units of the time that it took.
DIGEST_IDLE = 3.0
#: Lines that name pieces of one step, before they are only counted.
NAMED_PER_STEP = 10


# ----------------------------------------------------------------------------------------------------- the pieces


class Checkpoints:
    """Pieces of a run, kept in a folder until the run has ended well. Safe to use from many threads.

    A piece is known by its step ("solve") and its key (the name of a frame), and valid as long as its fingerprint is
    the one asked for. Without a folder (``resume = off``) nothing is kept and nothing is found.

    Parameters
    ----------
    folder : Path, optional
        Made when the first piece is kept.
    mode : {"auto", "force"}
        How inputs are recognised.
    tell : callable
        ``tell(level, text)``, level "INFO" or "WARN".
    """

    def __init__(
        self, folder: Path | None = None, mode: str = "off", tell: Callable[[str, str], Any] = lambda level, text: None
    ) -> None:
        self.folder = folder
        self.mode = mode if folder else "off"
        self.used: Counter[str] = Counter()
        self.made_again: Counter[str] = Counter()
        self._tell = tell
        self._lock = threading.RLock()
        self._records: dict[tuple[str, str], dict[str, Any]] = {}
        self._tokens: dict[str, str] = {}
        self._held: list[str] = []
        self._full = False
        self._index: int | None = None
        self._pieces: int | None = None
        self._end = 0
        self._stop = threading.Event()
        self._digests: threading.Thread | None = None
        self._undigested: list[str] = []
        if folder is not None:
            self._read_index()

    @property
    def enabled(self) -> bool:
        """Whether anything is kept at all."""
        return self.folder is not None

    @property
    def empty(self) -> bool:
        """Whether no piece is kept; inputs that were only recorded are none."""
        return all(step == "input" for step, _ in self._records)

    def report(self) -> dict[str, Any]:
        """What was used of an earlier run, for run_report.json: pieces by step; the blocks of a mosaic count singly."""
        return {"setting": self.mode, "used": dict(self.used), "made_again": dict(self.made_again)}

    # small pieces

    def load(self, step: str, key: str, fingerprint: str) -> bytes | None:
        """A small piece, or None where there is none that is valid and undamaged."""
        record = self._find(step, key, fingerprint)
        if record is None or "size" not in record:
            return None
        try:
            with (self.folder / "pieces").open("rb") as stream:
                stream.seek(record["offset"])
                data = stream.read(record["size"])
        except OSError:
            data = b""
        return data if self._whole(step, key, record, bytes_digest(data)) else None

    def save(self, step: str, key: str, fingerprint: str, data: bytes) -> None:
        """Keep a small piece (up to about a megabyte)."""
        if not self.enabled:
            return
        with self._lock, self._unhindered(step, key):
            if self._full:
                return
            self._open()
            offset, self._end = self._end, self._end + len(data)
            _write_all(self._pieces, data)
            self._append(
                step, key, {"print": fingerprint, "digest": bytes_digest(data), "offset": offset, "size": len(data)}
            )

    # large pieces

    def find(self, step: str, key: str, fingerprint: str) -> Path | None:
        """The file of a large piece, read once to see that it is whole; None as with :meth:`load`."""
        record = self._find(step, key, fingerprint)
        if record is None or "file" not in record:
            return None
        path = self.folder / "files" / Path(record["file"]).name
        try:
            digest = file_digest(path)
        except OSError:
            digest = ""
        return path if self._whole(step, key, record, digest) else None

    def store(
        self, step: str, key: str, fingerprint: str, write: Callable[[Path], Any], suffix: str = ""
    ) -> Path | None:
        """Let ``write(path)`` make a large piece, and keep it.

        Returns
        -------
        Path or None
            The complete file, which is there until the end of the run. None where nothing is kept (``write`` was not
            called), or where the disk does not take it: make the file elsewhere.
        """
        if not self.enabled:
            return None
        name = hashlib.blake2b(f"{step}\n{key}\n{fingerprint}".encode(), digest_size=12).hexdigest() + suffix
        path = self.folder / "files" / name
        part = path.with_name(f"part-{name}")  # a suffix may tell the writer what to write
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(part)
            digest = file_digest(part)
            part.replace(path)
        except (OSError, RunError) as error:
            self._tell("INFO", f"resume: {step} of {key} is not kept ({error})")
            return None
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        with self._lock, self._unhindered(step, key):
            self._append(step, key, {"print": fingerprint, "digest": digest, "file": name})
        return path

    # notes, which stand in the index itself

    def note(self, step: str, key: str, fingerprint: str, value: Any) -> None:
        """Keep what a line of JSON holds."""
        if self.enabled:
            with self._lock, self._unhindered(step, key):
                self._append(step, key, {"print": fingerprint, "note": value})

    def notes(self, step: str, fingerprint: str) -> dict[str, Any]:
        """All valid notes of a step, by key."""
        with self._lock:
            mine = {key: record for (name, key), record in self._records.items() if name == step}
        valid = {key: r["note"] for key, r in mine.items() if r["print"] == fingerprint and "note" in r}
        if mine and not valid:
            self._name(step, "INFO", f"resume: {step} belongs to another input or other settings; it is made again")
        return valid

    def forget(self, step: str) -> None:
        """Everything of a step is void from now on."""
        with self._lock:
            known = [place for place in self._records if place[0] == step]
            if not known:
                return
            for place in known:
                del self._records[place]
            with self._unhindered(step, ""):
                self._append(step, "", None)

    def part(self, name: str) -> Path | None:
        """Where a mosaic is made; None where nothing is kept."""
        if self.folder is None:
            return None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return None
        return self.folder / f"{name}.part"

    def remove_part(self, name: str) -> None:
        """Remove a mosaic that nobody can go on with."""
        if self.folder is not None:
            with suppress(OSError):
                (self.folder / f"{name}.part").unlink(missing_ok=True)

    # inputs

    def identify(self, paths: Iterable[Path], jobs: int = 1) -> None:
        """Recognise the inputs: afterwards :meth:`token` knows them."""
        if not self.enabled:
            return
        facts = {}
        for path in paths:
            with suppress(OSError):  # gone by now: whoever reads it says so
                facts[_key_of(path)] = _facts(path)
        inputs = [record["note"] for (step, _), record in self._records.items() if step == "input"]
        known = {note["digest"]: note["token"] for note in inputs if note["digest"]}
        doubtful = [key for key, now in facts.items() if known and self._in_doubt(key, now)]
        contents: dict[str, str | None] = {}
        if doubtful:
            with ThreadPoolExecutor(max(jobs, 1)) as pool:
                contents = dict(zip(doubtful, pool.map(_content, doubtful), strict=True))
        with self._lock, self._unhindered("input", "this run"):
            for key, now in facts.items():
                self._recognise(key, now, contents.get(key), known)
        self._digest_later(facts)

    def token(self, path: Path) -> str:
        """Name of an input that stays as long as it is the same; of a file that nobody knows, one that never was."""
        with self._lock:
            return self._tokens.setdefault(_key_of(path), secrets.token_hex(8))

    def vouch(self, path: Path, token: str) -> None:
        """Give a token to a file that this run made, such as the fingerprint that its content follows from."""
        with self._lock:
            self._tokens[_key_of(path)] = token

    def close(self) -> None:
        """End the work in the background and close the files."""
        self._stop.set()
        thread = self._digests
        if thread is not None:
            thread.join(1.0)  # it may hang in a slow disk; nothing of it is written any more
        with self._lock:
            for handle in (self._index, self._pieces):
                if handle is not None:
                    os.close(handle)
            self._index = self._pieces = None

    # -- how it is done

    def _in_doubt(self, key: str, now: dict[str, int]) -> bool:
        """Whether the content must be looked at to recognise a file."""
        old = self._recorded(key)
        if self.mode == "force":
            return True
        return bool(old and old["digest"] and old["size"] == now["size"] and not _surely_same(old, now))

    def _recorded(self, key: str) -> dict[str, Any] | None:
        return self._records.get(("input", key), {}).get("note")

    def _recognise(self, key: str, now: dict[str, int], content: str | None, known: dict[str, str]) -> None:
        """Give a file its token: that of the recorded file where it is the same, else a new one."""
        old = self._recorded(key)
        same = old is not None and _surely_same(old, now)
        digest = content
        if content and old is not None and old["digest"]:
            same = content == old["digest"]
        elif same:
            digest = content or old["digest"]
        if same:
            token = old["token"]
        else:
            token = known.get(content) or secrets.token_hex(8)
            if old is not None and content not in known:
                name = Path(key).name
                self._name("input", "INFO", f"resume: {name} has changed since the stopped run, or may have")
        self._tokens[key] = token
        note = {**now, "token": token, "digest": digest}
        if old is None or not note.items() <= old.items():
            self._append("input", key, {"print": "", "note": {**note, "seen": time.time_ns()}}, hold=True)

    def _digest_later(self, keys: Iterable[str]) -> None:
        """Have the digests of these inputs made in the background, where they are not known."""
        with self._lock:
            self._undigested += [key for key in keys if not self._recorded(key)["digest"]]
            if self._undigested and self._digests is None:
                self._digests = threading.Thread(target=self._digest_all, name="digests", daemon=True)
                self._digests.start()

    def _digest_all(self) -> None:
        """Digests of the inputs, at leisure, from when the run has lasted a while."""
        if self._stop.wait(DIGESTS_AFTER):
            return
        if sys.platform == "linux":  # elsewhere a thread has no priority of its own that Python could set
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while True:
            with self._lock:
                if not self._undigested:
                    self._digests = None
                    return
                key = self._undigested.pop(0)
                old = self._recorded(key)
            with suppress(OSError):  # a file that is gone, or cannot be read, has no digest
                self._digest(key, old)
            if self._stop.is_set():
                return

    def _digest(self, key: str, old: dict[str, Any]) -> None:
        digest = file_digest(Path(key), lambda seconds: self._stop.wait(DIGEST_IDLE * seconds))
        unchanged = _facts(Path(key)).items() <= old.items()
        with self._lock, self._unhindered("input", key):
            if digest and unchanged and not self._stop.is_set():
                self._append("input", key, {"print": "", "note": {**old, "digest": digest}}, hold=True)

    def _find(self, step: str, key: str, fingerprint: str) -> dict[str, Any] | None:
        with self._lock:
            record = self._records.get((step, key))
            if record is None or record["print"] == fingerprint:
                return record
            del self._records[step, key]
        self._name(
            step, "INFO", f"resume: {step} of {key} belongs to another input or other settings; it is made again"
        )
        return None

    def _whole(self, step: str, key: str, record: dict[str, Any], digest: str) -> bool:
        if digest == record["digest"]:
            with self._lock:
                self.used[step] += 1
            return True
        with self._lock:
            self._records.pop((step, key), None)
        self.damaged(step, key)
        return False

    def damaged(self, step: str, what: str) -> None:
        """Name a piece that is damaged and made again."""
        self._name(step, "WARN", f"resume: {step} of {what} is damaged; it alone is made again")

    def _name(self, step: str, level: str, text: str) -> None:
        """One line about a piece; the hundredth of a kind is only counted."""
        with self._lock:
            self.made_again[step] += 1
            count = self.made_again[step]
        if count <= NAMED_PER_STEP:
            self._tell(level, text)
        elif count == NAMED_PER_STEP + 1:
            self._tell(level, f"resume: more of {step} is made again; run_report.json tells how much")

    @contextmanager
    def _unhindered(self, step: str, key: str) -> Iterator[None]:
        """A disk that takes no more costs the piece, and all that follow, but not the run."""
        try:
            yield
        except OSError as error:
            self._full = True
            reason = error.strerror or error
            self._tell("INFO", f"resume: {step} of {key} and what follows is not kept for a resume ({reason})")

    def _append(self, step: str, key: str, record: dict[str, Any] | None, hold: bool = False) -> None:
        """Write a line of the index; held back until there is something that it is worth the folder for."""
        if record is not None:
            self._records[step, key] = record
        if self._full:
            return
        self._held.append(index_line({"step": step, "key": key, **(record or {"forget": True})}))
        if hold and self._index is None:
            return
        self._open()
        lines, self._held = "".join(self._held).encode(), []
        _write_all(self._index, lines)

    def _open(self) -> None:
        """Open the files for appending; where the folder is new, it is made."""
        if self._index is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
        self._pieces = os.open(self.folder / "pieces", flags, 0o666)
        self._end = os.fstat(self._pieces).st_size
        self._index = os.open(self.folder / "index", flags, 0o666)
        # a line that a kill has cut short must not swallow the next one
        head = index_line({"format": FORMAT}) if os.fstat(self._index).st_size == 0 else "\n"
        _write_all(self._index, head.encode())

    def _read_index(self) -> None:
        """Read what an earlier run has left; where that is of no use, start afresh and say so."""
        if not os.path.lexists(self.folder):
            return
        try:
            lines = (self.folder / "index").read_bytes().split(b"\n")
        except FileNotFoundError:
            lines = []
        except OSError as error:
            self._start_afresh(f"cannot be read ({error.strerror or error})")
            return
        rows = [row for row in map(parsed_line, lines) if row is not None]
        if not rows or rows[0].get("format") != FORMAT:
            self._start_afresh("was not left by this version")
            return
        torn = sum(1 for line in lines if line) - len(rows)
        if torn:
            self._tell("INFO", f"resume: {torn} damaged lines of the index are passed over")
        for path in (self.folder / "files").glob("part-*"):  # what a kill has cut short
            path.unlink(missing_ok=True)
        for row in rows[1:]:
            step, key = row.pop("step", ""), row.pop("key", "")
            if row.get("forget"):
                self._records = {place: r for place, r in self._records.items() if place[0] != step}
            elif "print" in row:
                self._records[step, key] = row

    def _start_afresh(self, why: str) -> None:
        """Without what is in the folder; where that can neither be removed nor replaced, without keeping anything."""
        self._tell("INFO", f"resume: {self.folder} {why}; the run starts afresh")
        if not remove(self.folder) and (not self.folder.is_dir() or os.path.lexists(self.folder / "index")):
            self._tell("INFO", f"resume: {self.folder} cannot be removed; nothing is kept for a resume")
            self.folder, self.mode = None, "off"


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _content(key: str) -> str | None:
    try:
        return file_digest(Path(key))
    except OSError:
        return None


def _key_of(path: Path) -> str:
    return os.path.abspath(path)  # noqa: PTH100 - as the user sees it, links kept


def _facts(path: Path) -> dict[str, int]:
    """Size and times of a file; the inode's time where the system has one."""
    found = path.stat()
    changed = 0 if os.name == "nt" else found.st_ctime_ns
    return {"size": found.st_size, "mtime": found.st_mtime_ns, "ctime": changed}


def _surely_same(old: dict[str, Any], now: dict[str, int]) -> bool:
    return now.items() <= old.items() and old["seen"] - old["mtime"] >= UNSETTLED_NS


def remove(folder: Path) -> bool:
    """Remove a folder of checkpoints, but nothing in it that is not ours; tells whether it is gone."""
    shutil.rmtree(folder / "files", ignore_errors=True)
    with suppress(OSError):
        for path in [folder / "index", folder / "pieces", *folder.glob("*.part")]:
            path.unlink(missing_ok=True)
        folder.rmdir()
    return not os.path.lexists(folder)


@contextmanager
def checkpoints(output: Path, settings: Settings, tell: Callable[[str, str], Any]) -> Iterator[Checkpoints]:
    """The checkpoints of a run into ``output``: what an earlier one left, and what this one leaves if it is stopped.

    Parameters
    ----------
    output : Path
        The output folder; nobody else may be writing to it (`host.folders.log_file` sees to that).
    settings : Settings
        ``resume`` and ``cache_retention``.
    tell : callable
        ``tell(level, text)``.
    """
    folder = output / FOLDER
    if settings.resume == "off":
        if not remove(folder):
            tell("INFO", f"resume: {folder} cannot be removed")
        yield Checkpoints()
        return
    kept = Checkpoints(folder, settings.resume, tell)
    first = kept.empty
    try:
        yield kept
    except BaseException as error:
        kept.close()
        # an input that cannot be used will not be finished; what another run has left must wait all the same
        if kept.empty or (first and isinstance(error, UsageError)):
            remove(folder)
        raise
    kept.close()
    if settings.cache_retention != "keep" and not remove(folder):
        tell("INFO", f"resume: {folder} cannot be removed")


# ---------------------------------------------------------------------------------------------- digests and lines


def index_line(record: dict[str, Any]) -> str:
    text = json.dumps(record)
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def parsed_line(line: bytes) -> dict[str, Any] | None:
    """A line of the index; None where it is damaged."""
    crc, _, text = line.partition(b" ")
    if not text or crc != b"%08x" % zlib.crc32(text):
        return None
    return json.loads(text)
