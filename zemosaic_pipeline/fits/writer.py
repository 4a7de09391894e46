"""Mosaics out: FITS files that are laid out on disk first and then written block by block, in any order."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
from astropy.io import fits

from zemosaic_pipeline.errors import RunError
from zemosaic_pipeline.files import atomic_path, checksum, not_written

BLOCK = 2880
"""Bytes of a FITS record: headers and data are padded to it."""


def _layout_header(first: fits.Card, axes: tuple[int, ...], bitpix: int) -> fits.Header:
    """Return the mandatory cards of an image; `axes` in numpy order."""
    header = fits.Header([first, ("BITPIX", bitpix, "array data type"), ("NAXIS", len(axes))])
    for number, length in enumerate(reversed(axes), start=1):
        header[f"NAXIS{number}"] = length
    return header


def _padded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


class MosaicWriter:
    """Write an image to FITS block by block; the file appears complete at the end, or not at all.

    Use it as a context manager. The file is laid out at its full size when it is entered; blocks may come in
    any order and from any thread. What is never written stays 0 (no data). Rows as wide as the image are one
    write per channel.

    Parameters
    ----------
    path : Path or str
        The final file; an older one is replaced.
    header : Header
        WCS, HISTORY and other keywords; those that describe the array are made here.
    shape : tuple of int
        (C, H, W) or (H, W).
    dtype : str
        'f4', or 'u2': unsigned 16 bits (BZERO 32768), values rounded and clipped to 0..65535.
    alpha_shape : tuple of int, optional
        (H, W) of an extension ALPHA (uint8).
    interleaved : bool
        Store (H, W, C) instead of (C, H, W), as old programs want it; blocks are (C, h, w) all the same.
    waiting : Path, optional
        Where the unfinished file lies, on the same disk; on an error it stays there for a resume.
    resume : bool
        Go on with what lies in `waiting`, or else under the final name, if it is laid out as this file is; else
        start afresh. Blocks are known by their checksums, which are made only where `waiting` is given.

    Attributes
    ----------
    resumed : bool
        Whether there was such a file.

    Raises
    ------
    RunError
        There is not enough space, or the file cannot be written; with the file's name and the remedy.
    ValueError
        A shape or a dtype that cannot be written, or a block that lies outside.
    """

    def __init__(
        self,
        path: Path | str,
        header: fits.Header,
        shape: tuple[int, ...],
        dtype: str = "f4",
        alpha_shape: tuple[int, int] | None = None,
        interleaved: bool = False,
        waiting: Path | None = None,
        resume: bool = False,
    ) -> None:
        if dtype not in ("f4", "u2") or len(shape) not in (2, 3) or min(shape) < 1:
            raise ValueError(f"an image {shape} of dtype {dtype} cannot be written")
        self.path = Path(path)
        channels, height, width = (1, *shape) if len(shape) == 2 else shape
        self.shape = (channels, height, width)
        self._size = (height, width)
        self.alpha_shape = alpha_shape
        self.resumed = False
        self._waiting, self._resume = waiting, resume
        self._unsigned = dtype == "u2"
        self._interleaved = interleaved and len(shape) == 3
        self._stack = ExitStack()
        self._lock = threading.Lock()
        axes = (*shape[1:], shape[0]) if self._interleaved else tuple(shape)
        head = self._image_header(header, axes).tostring().encode("ascii")
        self._itemsize = 2 if self._unsigned else 4
        self._offset = len(head)
        self._parts = [(0, head)]
        self._total = _padded(len(head) + int(np.prod(axes, dtype=np.int64)) * self._itemsize)
        self._alpha_offset = 0
        if alpha_shape is not None:
            extension = _layout_header(fits.Card("XTENSION", "IMAGE", "Image extension"), alpha_shape, 8)
            for key, value in (("PCOUNT", 0), ("GCOUNT", 1), ("EXTNAME", "ALPHA")):
                extension[key] = value
            text = extension.tostring().encode("ascii")
            self._parts.append((self._total, text))
            self._alpha_offset = self._total + len(text)
            self._total = _padded(self._alpha_offset + alpha_shape[0] * alpha_shape[1])

    def _image_header(self, header: fits.Header, axes: tuple[int, ...]) -> fits.Header:
        first = fits.Card("SIMPLE", True, "conforms to FITS standard")
        image = _layout_header(first, axes, 16 if self._unsigned else -32)
        if self.alpha_shape is not None:
            image["EXTEND"] = True
        if self._unsigned:
            image["BSCALE"] = 1
            image["BZERO"] = 32768
        given = header.copy(strip=True)
        for key in ("BSCALE", "BZERO", "BLANK", "CHECKSUM", "DATASUM", "EXTEND", "EXTNAME"):
            given.remove(key, ignore_missing=True, remove_all=True)
        image.extend(given, unique=False, update=False, end=True)
        if "CONTINUE" in image.tostring() and "LONGSTRN" not in image:
            image["LONGSTRN"] = ("OGIP 1.0", "long strings may be continued")
        return image

    def __enter__(self) -> MosaicWriter:
        with self._errors_told(), ExitStack() as stack:
            self.resumed = self._take_up()
            self._require_space()
            part = stack.enter_context(atomic_path(self.path, self._waiting))
            self._file = stack.enter_context(part.open("r+b" if self.resumed else "w+b", buffering=0))
            if not self.resumed:
                self._lay_out()
            self._stack = stack.pop_all()
        return self

    def _lay_out(self) -> None:
        self._file.truncate(self._total)
        for offset, head in self._parts:
            self._write_at(offset, head)
        if self._unsigned:
            self._write_zeros()

    def _take_up(self) -> bool:
        """Bring what can be resumed to where the unfinished file lies, and remove there what cannot."""
        if self._waiting is None:
            return False
        if self._resume and self._is_laid_out(self._waiting):
            return True
        self._waiting.unlink(missing_ok=True)
        if self._resume and self._is_laid_out(self.path):
            self.path.replace(self._waiting)
            return True
        return False

    def _is_laid_out(self, path: Path) -> bool:
        """Whether a file has the size and the headers of this one."""
        if not path.is_file() or path.stat().st_size != self._total:
            return False
        with path.open("rb") as stream:
            for offset, head in self._parts:
                stream.seek(offset)
                if stream.read(len(head)) != head:
                    return False
        return True

    def _require_space(self) -> None:
        needed = self._total
        if self.resumed and self._waiting is not None:
            needed -= 512 * getattr(self._waiting.stat(), "st_blocks", 0)
        free = shutil.disk_usage(self.path.parent).free
        if free < needed:
            sizes = f"needs {needed / 1e6:.3g} MB and the disk has {free / 1e6:.3g} MB left"
            raise RunError(f"{self.path} {sizes}: make room or choose another folder.")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        with self._errors_told():
            return self._stack.__exit__(kind, error, traceback)

    def _write_zeros(self) -> None:
        """Fill the image with the stored value that means 0 where that is not 0 itself."""
        count, step = int(np.prod(self.shape, dtype=np.int64)), 1 << 20
        zeros = np.full(min(step, count), -32768, ">i2")
        for first in range(0, count, step):
            self._write_at(self._offset + 2 * first, zeros[: min(step, count - first)])

    @contextmanager
    def _errors_told(self) -> Iterator[None]:
        """Tell an error of the system in one sentence that names the file and the remedy."""
        try:
            yield
        except OSError as error:
            raise not_written(self.path, error) from error

    def write_block(self, y0: int, x0: int, block: np.ndarray) -> int:
        """Write a block with its first pixel at (y0, x0); NaN and infinities are written as 0.

        Parameters
        ----------
        y0, x0 : int
            First row and column.
        block : ndarray, (C, h, w) or (h, w)
            Any real dtype.

        Returns
        -------
        int
            Checksum of what was written, as :meth:`read_block` makes it; 0 where `waiting` was not given.
        """
        block = block[None] if block.ndim == 2 else block
        if block.shape[0] != self.shape[0]:
            raise ValueError(f"a block of {block.shape[0]} channels for an image of {self.shape[0]}")
        planes = (np.moveaxis(block, 0, 2),) if self._interleaved else block
        total = 0
        for start, plane in zip(self._planes(), planes, strict=True):
            total = self._write_rows(start, self._size, y0, x0, self._encoded(plane), total)
        return total

    def write_alpha(self, y0: int, x0: int, block: np.ndarray) -> int:
        """Write a block of the extension ALPHA: uint8 (h, w), 0 = nothing seen, 255 = full weight; its checksum."""
        if self.alpha_shape is None or block.dtype != np.uint8 or block.ndim != 2:
            raise ValueError("ALPHA takes uint8 blocks (h, w), where alpha_shape was given")
        return self._write_rows(self._alpha_offset, self.alpha_shape, y0, x0, np.ascontiguousarray(block))

    def read_block(self, y0: int, x0: int, size: tuple[int, int]) -> tuple[np.ndarray, int]:
        """A block of `size` (h, w) of a float32 image as it stands on disk, float32 (C, h, w), and its checksum."""
        dtype = np.dtype(">f4")
        count = (self.shape[0],) if self._interleaved else ()
        planes, total = [], 0
        for start in self._planes():
            plane, total = self._read_rows(start, self._size, y0, x0, np.empty((*size, *count), dtype), total)
            planes.append(plane.astype(np.float32))
        return np.ascontiguousarray(np.moveaxis(planes[0], 2, 0)) if self._interleaved else np.stack(planes), total

    def read_alpha(self, y0: int, x0: int, size: tuple[int, int]) -> tuple[np.ndarray, int]:
        """A block of the extension ALPHA as it stands on disk, uint8 (h, w), and its checksum."""
        if self.alpha_shape is None:
            raise ValueError("there is no ALPHA to be read where no alpha_shape was given")
        return self._read_rows(self._alpha_offset, self.alpha_shape, y0, x0, np.empty(size, np.uint8))

    def _planes(self) -> list[int]:
        """Byte offsets of the planes, or of the one interleaved image."""
        channels, height, width = self.shape
        size = height * width * self._itemsize
        return [self._offset] if self._interleaved else [self._offset + c * size for c in range(channels)]

    def _encoded(self, block: np.ndarray) -> np.ndarray:
        """Return `block` as it is stored: contiguous, big-endian, 0 for no data."""
        if self._unsigned:
            values = np.nan_to_num(block, nan=0.0, posinf=0.0, neginf=0.0)
            return (np.clip(np.rint(values), 0, 65535) - 32768).astype(">i2", order="C")
        values = np.ascontiguousarray(block, np.float32)
        if sys.byteorder == "big":
            return np.where(np.isfinite(values), values, np.float32(0))
        from zemosaic_pipeline.pixels.cpu_loops import stored_bytes

        out = np.empty(values.shape, np.uint32)
        stored_bytes(values.reshape(-1, values.shape[-1]), out.reshape(-1, values.shape[-1]))
        return out.view(">f4")

    def _write_rows(
        self, start: int, size: tuple[int, int], y0: int, x0: int, values: np.ndarray, total: int = 0
    ) -> int:
        """Write (h, w) or (h, w, C) stored values into the plane of `size` that begins at byte `start`."""
        with self._errors_told():
            for offset, piece in _pieces(start, size, y0, x0, values):
                self._write_at(offset, piece)
        return 0 if self._waiting is None else checksum(values, total)

    def _read_rows(
        self, start: int, size: tuple[int, int], y0: int, x0: int, out: np.ndarray, total: int = 0
    ) -> tuple[np.ndarray, int]:
        """Fill `out` from where :meth:`_write_rows` puts it; and the checksum."""
        with self._errors_told():
            for offset, piece in _pieces(start, size, y0, x0, out):
                self._read_at(offset, piece)
        return out, checksum(out, total)

    def _write_at(self, offset: int, data: bytes | np.ndarray) -> None:
        """Write all of `data` at a byte offset; the system may take it in several portions."""
        view = memoryview(data) if isinstance(data, bytes) else data.reshape(-1).view(np.uint8).data
        while len(view):
            if hasattr(os, "pwrite"):
                done = os.pwrite(self._file.fileno(), view, offset)
            else:
                with self._lock:
                    self._file.seek(offset)
                    done = self._file.write(view)
            offset += done
            view = view[done:]

    def _read_at(self, offset: int, out: np.ndarray) -> None:
        """Fill the contiguous array `out` with what stands at a byte offset."""
        view = out.reshape(-1).view(np.uint8).data
        while len(view):
            with self._lock:
                self._file.seek(offset)
                done = self._file.readinto(view)
            if not done:
                raise OSError(f"it ends at byte {offset}")
            offset += done
            view = view[done:]


def _pieces(
    start: int, size: tuple[int, int], y0: int, x0: int, values: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Contiguous pieces of a block (h, w) or (h, w, C), each with its byte offset in the plane of `size`."""
    rows, columns = values.shape[:2]
    if not (0 <= y0 <= y0 + rows <= size[0] and 0 <= x0 <= x0 + columns <= size[1]):
        raise ValueError(f"a block of {rows} x {columns} at ({y0}, {x0}) lies outside {size}")
    if values.size == 0:
        return
    pixel = values.nbytes // (rows * columns)
    first = start + (y0 * size[1] + x0) * pixel
    for number, piece in enumerate(values[None] if columns == size[1] else values):
        yield first + number * size[1] * pixel, piece
