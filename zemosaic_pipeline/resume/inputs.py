"""Whether an input is the same file as in the stopped run: tokens, and digests made at leisure.

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

import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from zemosaic_pipeline.files import file_digest
from zemosaic_pipeline.resume.index import Index

#: A file whose modification time is less than this before the moment it was recorded could change unseen.
UNSETTLED_NS = 2_000_000_000
#: Digests of the inputs begin when a run has lasted so long, in seconds: a short run is made again as fast.
DIGESTS_AFTER = 5.0
#: Idle time after each piece of a digest, in units of the time that it took.
DIGEST_IDLE = 3.0

Facts = dict[str, int]


class Inputs:
    """The inputs of a run, recognised by what an index says of them.

    Parameters
    ----------
    index : Index
    by_content : bool
        ``resume = force``.
    changed : callable
        ``changed(name)``, for an input that is not what it was.
    """

    def __init__(self, index: Index, by_content: bool, changed: Callable[[str], object]) -> None:
        self._index, self._by_content, self._changed = index, by_content, changed
        self._tokens: dict[str, str] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._undigested: list[str] = []

    def identify(self, paths: Iterable[Path], jobs: int) -> None:
        """Recognise files: afterwards :meth:`token` knows them."""
        found: dict[str, Facts] = {}
        for path in paths:
            with suppress(OSError):  # gone by now: whoever reads it says so
                found[_key_of(path)] = _facts(path)
        recorded = [record["note"] for (step, _), record in self._index.records.items() if step == "input"]
        known = {note["digest"]: note["token"] for note in recorded if note["digest"]}
        doubtful = [key for key, now in found.items() if known and self._in_doubt(key, now)]
        contents: dict[str, str | None] = {}
        if doubtful:
            with ThreadPoolExecutor(max(jobs, 1)) as pool:
                contents = dict(zip(doubtful, pool.map(_content, doubtful), strict=True))
        with self._index.lock:
            for key, now in found.items():
                self._recognise(key, now, contents.get(key), known)
        self._digest_later(found)

    def token(self, path: Path | None) -> str:
        """Name of an input that stays as long as it is the same; of one that nobody knows, one that never was."""
        if path is None:
            return secrets.token_hex(8)
        with self._index.lock:
            return self._tokens.setdefault(_key_of(path), secrets.token_hex(8))

    def vouch(self, path: Path, token: str) -> None:
        """Give a token to a file that this run made."""
        with self._index.lock:
            self._tokens[_key_of(path)] = token

    def close(self) -> None:
        """End the work in the background."""
        self._stop.set()
        thread = self._thread
        if thread is not None:
            thread.join(1.0)  # it may hang in a slow disk; nothing of it is written any more

    def _in_doubt(self, key: str, now: Facts) -> bool:
        """Whether the content must be looked at to recognise a file."""
        old = self._recorded(key)
        if self._by_content:
            return True
        return bool(old and old["digest"] and old["size"] == now["size"] and not _surely_same(old, now))

    def _recorded(self, key: str) -> dict[str, Any] | None:
        return self._index.records.get(("input", key), {}).get("note")

    def _recognise(self, key: str, now: Facts, content: str | None, known: dict[str, str]) -> None:
        """Give a file its token: that of the recorded file where it is the same, else a new one."""
        old = self._recorded(key)
        same = old is not None and _surely_same(old, now)
        digest = content
        if old is not None and content and old["digest"]:
            same = content == old["digest"]
        elif old is not None and same:
            digest = content or old["digest"]
        if old is not None and same:
            token = old["token"]
        else:
            token = (known.get(content) if content else None) or secrets.token_hex(8)
            if old is not None and content not in known:
                self._changed(Path(key).name)
        self._tokens[key] = token
        note = {**now, "token": token, "digest": digest}
        if old is None or not note.items() <= old.items():
            self._record(key, {**note, "seen": time.time_ns()})

    def _record(self, key: str, note: dict[str, Any]) -> None:
        self._index.append("input", key, {"print": "", "note": note}, hold=True)

    def _digest_later(self, keys: Iterable[str]) -> None:
        """Have the digests of these inputs made in the background, where they are not known."""
        with self._index.lock:
            self._undigested += [key for key in keys if not (self._recorded(key) or {}).get("digest")]
            if self._undigested and self._thread is None:
                self._thread = threading.Thread(target=self._digest_all, name="digests", daemon=True)
                self._thread.start()

    def _digest_all(self) -> None:
        """Digests of the inputs, at leisure, from when the run has lasted a while."""
        if self._stop.wait(DIGESTS_AFTER):
            return
        if sys.platform == "linux":  # elsewhere a thread has no priority of its own that Python could set
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while not self._stop.is_set():
            with self._index.lock:
                if not self._undigested:
                    self._thread = None
                    return
                key = self._undigested.pop(0)
                old = self._recorded(key)
            if old is not None:
                with suppress(OSError):  # a file that is gone, or cannot be read, has no digest
                    self._digest(key, old)

    def _digest(self, key: str, old: dict[str, Any]) -> None:
        digest = file_digest(Path(key), lambda seconds: self._stop.wait(DIGEST_IDLE * seconds))
        unchanged = _facts(Path(key)).items() <= old.items()
        with self._index.lock:
            if digest and unchanged and not self._stop.is_set():
                self._record(key, {**old, "digest": digest})


def _content(key: str) -> str | None:
    try:
        return file_digest(Path(key))
    except OSError:
        return None


def _key_of(path: Path) -> str:
    return os.path.abspath(path)  # noqa: PTH100 - as the user sees it, links kept


def _facts(path: Path) -> Facts:
    """Size and times of a file; the inode's time where the system has one."""
    found = path.stat()
    changed = 0 if os.name == "nt" else found.st_ctime_ns
    return {"size": found.st_size, "mtime": found.st_mtime_ns, "ctime": changed}


def _surely_same(old: dict[str, Any], now: Facts) -> bool:
    return now.items() <= old.items() and old["seen"] - old["mtime"] >= UNSETTLED_NS
