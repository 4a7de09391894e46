"""Files that appear complete or not at all; JSON, checksums, arrays as bytes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zemosaic_pipeline.errors import RunError

# ----------------------------------------------------------------------------------------------- atomic files


def _fsync(path: Path, mode: str) -> None:
    with path.open(mode) as stream:
        os.fsync(stream.fileno())


def _fsync_folder(folder: Path) -> None:
    """Make a rename durable where the system can; Windows and some network folders cannot."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def atomic_path(target: Path | str, waiting: Path | None = None) -> Iterator[Path]:
    """Give a temporary path beside `target`; what was written there becomes `target` at the end, or nothing.

    The temporary file is hidden, bears the target's name and the process number, and ends in ``.part``. On
    success it is synced and renamed over the target; on any exception, Ctrl-C included, it is removed and an
    older target stays as it was.

    Parameters
    ----------
    target : Path or str
        The final file; its folder must exist.
    waiting : Path, optional
        The temporary path to use, on the same disk. What is there stays on an exception, for another run to go on
        with, unless the disk is full.

    Yields
    ------
    Path
        Where to write.

    Raises
    ------
    RunError
        The target cannot be replaced (on Windows: while another program has it open).
    """
    target = Path(target)
    part = waiting or target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        _fsync(part, "r+b")
        try:
            part.replace(target)
        except OSError as error:
            reason = error.strerror or error
            raise RunError(f"{target} cannot be replaced ({reason}); close it in other programs.") from error
    except BaseException as error:
        cause = error.__cause__ or error
        if waiting is None or (isinstance(cause, OSError) and is_disk_full(cause)):
            with contextlib.suppress(OSError):  # the first error is the one to tell
                part.unlink(missing_ok=True)
        raise
    _fsync_folder(target.parent)


def is_disk_full(error: OSError) -> bool:
    """Tell whether an error says that the disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def not_written(path: Path | str, error: OSError) -> RunError:
    """Put into one sentence that the system did not let `path` be written, with the remedy."""
    if is_disk_full(error):
        return RunError(f"The disk is full: {path} cannot be written; make room or choose another folder.")
    return RunError(f"{path} cannot be written ({error.strerror or error}); check the folder.")


def to_jsonable(value: Any) -> Any:
    """Turn `value` into what strict JSON can hold: numpy to Python, paths to text, NaN and infinity to None.

    Raises
    ------
    TypeError
        It holds an object of another kind.
    """
    if isinstance(value, np.ndarray | np.generic):
        return to_jsonable(value.tolist())
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_jsonable(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(to_jsonable(item) for item in value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"an object of type {type(value).__name__} cannot be written as JSON")


def write_json(path: Path | str, obj: Any) -> None:
    """Write `obj` (see `to_jsonable`) as indented UTF-8 JSON, complete or not at all.

    Raises
    ------
    RunError
        The file cannot be written.
    TypeError
        `obj` holds what JSON cannot.
    """
    text = json.dumps(to_jsonable(obj), indent=2, ensure_ascii=False, allow_nan=False)
    try:
        with atomic_path(path) as part:
            # a file name that is no UTF-8 (Linux) comes as lone surrogates: they become JSON's own escapes
            part.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise not_written(path, error) from error


def checksum(data: np.ndarray | bytes, start: int = 0) -> int:
    """Fast checksum (32 bits) of bytes: words summed in 1024 lanes, then CRC-32; at the speed of memory.

    Any single changed word is noticed, and so are lost and zeroed stretches. ``start`` continues an earlier one.
    """
    view = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.reshape(-1).view(np.uint8)
    whole = len(view) // 8192 * 8192
    lanes = np.add.reduce(view[:whole].view("<u8").reshape(-1, 1024), axis=0)
    return zlib.crc32(view[whole:].data, zlib.crc32(lanes, start))


# ------------------------------------------------------------------------------------------------- arrays as bytes


def pack(values: dict[str, Any]) -> bytes:
    """Arrays and what JSON holds, by name, as bytes; exact to the bit. See :func:`unpack`."""
    arrays = {name: np.ascontiguousarray(v) for name, v in values.items() if isinstance(v, np.ndarray)}
    head = {
        "arrays": {name: [array.dtype.str, array.shape] for name, array in arrays.items()},
        "plain": {name: v for name, v in values.items() if name not in arrays},
    }
    return b"".join([json.dumps(head).encode(), b"\n", *(array.tobytes() for array in arrays.values())])


def unpack(data: bytes) -> dict[str, Any]:
    """What :func:`pack` made into bytes; the arrays may be written to."""
    text, _, rest = data.partition(b"\n")
    head = json.loads(text)
    values, offset = dict(head["plain"]), 0
    for name, (dtype, shape) in head["arrays"].items():
        count = int(np.prod(shape, dtype=np.int64))
        values[name] = np.frombuffer(rest, dtype, count, offset).reshape(shape).copy()
        offset += values[name].nbytes
    return values


def bytes_digest(data: bytes) -> str:
    """Digest of bytes, as text."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def file_digest(path: Path, pause: Callable[[float], bool] | None = None) -> str:
    """Digest of a file's content. ``pause(seconds)`` is called after every megabyte; it ends the work with True."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb", buffering=0) as stream:
        while True:
            began = time.perf_counter()
            data = stream.read(1 << 20)
            if not data:
                return digest.hexdigest()
            digest.update(data)
            if pause is not None and pause(time.perf_counter() - began):
                return ""
