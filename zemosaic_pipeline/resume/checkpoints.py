"""What a stopped, killed or crashed run leaves for the next one with the same input and settings.

A folder ``zemosaic_resume`` in OUTPUT_DIR exists from the first finished piece of a run to its successful end (and
beyond it with ``cache_retention = keep``). It holds the index and the pieces (`resume.index`), and ``science.part`` and
so on: mosaics in the making; the index knows the checksum of every finished block (`resume.journal.BlockJournal`).

Nothing here is ever an obstacle. What cannot be read, is damaged, or belongs to another input, other settings or
another version of the program is named in the log and made again, it alone.

What belongs together
---------------------
Each piece bears a *fingerprint*: a digest of everything that its bits depend on. That is the program (the content of
its modules), the versions of the libraries, the settings that act in its step, the *tokens* of the inputs
(`resume.inputs`), and what earlier steps found. The number of threads is not in it, since no bit depends on it; the name of the backend is, since pixels of CPU and GPU may differ in their last bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from zemosaic_pipeline.errors import UsageError
from zemosaic_pipeline.files import bytes_digest
from zemosaic_pipeline.resume.fingerprint import fingerprint
from zemosaic_pipeline.resume.index import Index, Record, Tell, read_index, remove
from zemosaic_pipeline.resume.inputs import Inputs
from zemosaic_pipeline.settings.settings import Settings

FOLDER = "zemosaic_resume"
#: Lines that name pieces of one step, before they are only counted.
NAMED_PER_STEP = 10

Piece = TypeVar("Piece")


@dataclass(frozen=True)
class Codec(Generic[Piece]):
    """How a piece becomes bytes (up to about a megabyte) and comes back, exact to the bit."""

    pack: Callable[[Piece], bytes]
    unpack: Callable[[bytes], Piece]


class NothingKept:
    """Where nothing is kept and nothing is found: every piece is made. :class:`Checkpoints` are the other way."""

    def identify(self, paths: Iterable[Path], jobs: int = 1) -> None:
        """Recognise the inputs: afterwards :meth:`token` knows them."""

    def token(self, path: Path | None) -> str:
        """Name of an input that stays as long as it is the same; None for pixels that come from no file."""
        return ""

    def vouch(self, path: Path, token: str) -> None:
        """Give a token to a file that this run made, such as the fingerprint that its content follows from."""

    def fingerprint(self, step: str, *parts: Any) -> str:
        """Digest of what a piece of ``step`` depends on: the settings that act in it, and ``parts``."""
        return ""

    def cached(
        self,
        step: str,
        key: str,
        fingerprint: str,
        compute: Callable[[], Piece],
        codec: Codec[Piece],
        *,
        valid: Callable[[Piece], bool] = lambda piece: True,
        title: str = "",
    ) -> Piece:
        """What ``compute()`` gives, or gave in the run that was stopped.

        Parameters
        ----------
        step, key : str
            The piece is known by them ("solve", the name of a frame).
        fingerprint : str
            Its :meth:`fingerprint`.
        compute : callable
            Makes it. None, or an exception, is not kept.
        codec : Codec
        valid : callable
            Whether what was found can be used still.
        title : str
            What is told to be used ("the photometric solution"); nothing is told without one.
        """
        return compute()

    def report(self) -> dict[str, Any]:
        """What was used of an earlier run, for run_report.json: pieces by step; the blocks of a mosaic count singly."""
        return {"setting": "off", "used": {}, "made_again": {}}


class Checkpoints(NothingKept):
    """Pieces of a run, kept in a folder until the run has ended well. Safe to use from many threads.

    A piece is valid as long as its fingerprint is the one asked for.

    Parameters
    ----------
    index : Index
    settings : Settings
        ``resume`` says how inputs are recognised; all enter into fingerprints.
    tell : callable
        ``tell(level, text)``, level "INFO" or "WARN".
    """

    def __init__(self, index: Index, settings: Settings, tell: Tell) -> None:
        self._index, self._settings, self._tell = index, settings, tell
        self._inputs = Inputs(index, settings.resume == "force", self._input_changed)
        self.used: Counter[str] = Counter()
        self.made_again: Counter[str] = Counter()

    @property
    def folder(self) -> Path:
        return self._index.folder

    @property
    def empty(self) -> bool:
        """Whether no piece is kept; inputs that were only recorded are none."""
        return all(step == "input" for step, _ in self._index.records)

    def identify(self, paths: Iterable[Path], jobs: int = 1) -> None:
        self._inputs.identify(paths, jobs)

    def token(self, path: Path | None) -> str:
        return self._inputs.token(path)

    def vouch(self, path: Path, token: str) -> None:
        self._inputs.vouch(path, token)

    def fingerprint(self, step: str, *parts: Any) -> str:
        return fingerprint(step, self._settings, *parts)

    def cached(
        self,
        step: str,
        key: str,
        fingerprint: str,
        compute: Callable[[], Piece],
        codec: Codec[Piece],
        *,
        valid: Callable[[Piece], bool] = lambda piece: True,
        title: str = "",
    ) -> Piece:
        data = self._load(step, key, fingerprint)
        if data is not None:
            piece = codec.unpack(data)
            if valid(piece):
                self.use(step)
                if title:
                    self._tell("INFO", f"resume: {title} of the stopped run is used")
                return piece
            self._drop(step, key)
            self._again(step, "INFO", f"resume: {step} of {key} is not what it was; it is made again")
        piece = compute()
        if piece is not None:
            data = codec.pack(piece)
            self._index.append_piece(step, key, data, {"print": fingerprint, "digest": bytes_digest(data)})
        return piece

    def report(self) -> dict[str, Any]:
        return {"setting": self._settings.resume, "used": dict(self.used), "made_again": dict(self.made_again)}

    def close(self) -> None:
        """End the work in the background and close the files."""
        self._inputs.close()
        self._index.close()

    # notes, which stand in the index itself; mosaics in the making

    def note(self, step: str, key: str, fingerprint: str, value: Any) -> None:
        """Keep what a line of JSON holds."""
        self._index.append(step, key, {"print": fingerprint, "note": value})

    def notes(self, step: str, fingerprint: str) -> dict[str, Any]:
        """All valid notes of a step, by key."""
        with self._index.lock:
            mine = {key: record for (name, key), record in self._index.records.items() if name == step}
        valid = {key: r["note"] for key, r in mine.items() if r["print"] == fingerprint and "note" in r}
        if mine and not valid:
            self._again(step, "INFO", f"resume: {step} belongs to another input or other settings; it is made again")
        return valid

    def forget(self, step: str) -> None:
        """Everything of a step is void from now on."""
        with self._index.lock:
            known = [place for place in self._index.records if place[0] == step]
            for place in known:
                del self._index.records[place]
            if known:
                self._index.append(step, "", None)

    def part(self, name: str) -> Path | None:
        """Where a mosaic is made; None where the folder cannot be made."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return None
        return self.folder / f"{name}.part"

    def remove_part(self, name: str) -> None:
        """Remove a mosaic that nobody can go on with."""
        with suppress(OSError):
            (self.folder / f"{name}.part").unlink(missing_ok=True)

    def use(self, step: str, pieces: int = 1) -> None:
        """Count what is used of the stopped run."""
        with self._index.lock:
            self.used[step] += pieces

    def damaged(self, step: str, what: str) -> None:
        """Name a piece that is damaged and made again."""
        self._again(step, "WARN", f"resume: {step} of {what} is damaged; it alone is made again")

    def _load(self, step: str, key: str, fingerprint: str) -> bytes | None:
        """The bytes of a piece, or None where there is none that is valid and undamaged."""
        with self._index.lock:
            record = self._index.records.get((step, key))
        if record is None or "size" not in record:
            return None
        if record["print"] != fingerprint:
            self._drop(step, key)
            text = f"resume: {step} of {key} belongs to another input or other settings; it is made again"
            self._again(step, "INFO", text)
            return None
        data = self._index.piece(record)
        if bytes_digest(data) != record["digest"]:
            self._drop(step, key)
            self.damaged(step, key)
            return None
        return data

    def _drop(self, step: str, key: str) -> Record | None:
        with self._index.lock:
            return self._index.records.pop((step, key), None)

    def _input_changed(self, name: str) -> None:
        self._again("input", "INFO", f"resume: {name} has changed since the stopped run, or may have")

    def _again(self, step: str, level: str, text: str) -> None:
        """One line about what is made again; the hundredth of a kind is only counted."""
        with self._index.lock:
            self.made_again[step] += 1
            count = self.made_again[step]
        if count <= NAMED_PER_STEP:
            self._tell(level, text)
        elif count == NAMED_PER_STEP + 1:
            self._tell(level, f"resume: more of {step} is made again; run_report.json tells how much")


@contextmanager
def checkpoints(output: Path, settings: Settings, tell: Tell) -> Iterator[NothingKept]:
    """The checkpoints of a run into ``output``: what an earlier one left, and what this one leaves if it is stopped.

    Parameters
    ----------
    output : Path
        The output folder; nobody else may be writing to it (`host.folders.log_file` sees to that).
    settings : Settings
        ``resume`` and ``cache_retention``; all enter into fingerprints.
    tell : callable
        ``tell(level, text)``.
    """
    folder = output / FOLDER
    if settings.resume == "off":
        if not remove(folder):
            tell("INFO", f"resume: {folder} cannot be removed")
        yield NothingKept()
        return
    index = read_index(folder, tell)
    if index is None:
        yield NothingKept()
        return
    kept = Checkpoints(index, settings, tell)
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
