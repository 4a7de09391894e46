"""Mosaics out: FITS files that are laid out on disk first and then written block by block, in any order."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from astropy.io import fits

from zemosaic_utils import RunError, atomic_path, not_written

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
    ) -> None:
        if dtype not in ("f4", "u2") or len(shape) not in (2, 3) or min(shape) < 1:
            raise ValueError(f"an image {shape} of dtype {dtype} cannot be written")
        self.path = Path(path)
        self.shape = (1, *shape) if len(shape) == 2 else tuple(shape)
        self.alpha_shape = alpha_shape
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
        with self._told(), ExitStack() as stack:
            free = shutil.disk_usage(self.path.parent).free
            if free < self._total:
                sizes = f"needs {self._total / 1e6:.3g} MB and the disk has {free / 1e6:.3g} MB left"
                raise RunError(f"{self.path} {sizes}: make room or choose another folder.")
            part = stack.enter_context(atomic_path(self.path))
            self._file = stack.enter_context(part.open("w+b", buffering=0))
            self._file.truncate(self._total)
            for offset, head in self._parts:
                self._write_at(offset, head)
            if self._unsigned:
                self._write_zeros()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info) -> bool | None:
        with self._told():
            return self._stack.__exit__(*exc_info)

    def _write_zeros(self) -> None:
        """Fill the image with the stored value that means 0 where that is not 0 itself."""
        count, step = int(np.prod(self.shape, dtype=np.int64)), 1 << 20
        zeros = np.full(min(step, count), -32768, ">i2")
        for first in range(0, count, step):
            self._write_at(self._offset + 2 * first, zeros[: min(step, count - first)])

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Tell an error of the system in one sentence that names the file and the remedy."""
        try:
            yield
        except OSError as error:
            raise not_written(self.path, error) from error

    def write_block(self, y0: int, x0: int, block: np.ndarray) -> None:
        """Write a block with its first pixel at (y0, x0); NaN and infinities are written as 0.

        Parameters
        ----------
        y0, x0 : int
            First row and column.
        block : ndarray, (C, h, w) or (h, w)
            Any real dtype.
        """
        block = block[None] if block.ndim == 2 else block
        channels, height, width = self.shape
        if block.shape[0] != channels:
            raise ValueError(f"a block of {block.shape[0]} channels for an image of {channels}")
        if self._interleaved:
            values = self._encoded(np.moveaxis(block, 0, 2))
            self._write_rows(self._offset, (height, width), y0, x0, values)
            return
        for c in range(channels):
            plane = self._offset + c * height * width * self._itemsize
            self._write_rows(plane, (height, width), y0, x0, self._encoded(block[c]))

    def write_alpha(self, y0: int, x0: int, block: np.ndarray) -> None:
        """Write a block of the extension ALPHA: uint8 (h, w), 0 = nothing seen, 255 = fully weighted."""
        if self.alpha_shape is None or block.dtype != np.uint8 or block.ndim != 2:
            raise ValueError("ALPHA takes uint8 blocks (h, w), where alpha_shape was given")
        self._write_rows(self._alpha_offset, self.alpha_shape, y0, x0, np.ascontiguousarray(block))

    def _encoded(self, block: np.ndarray) -> np.ndarray:
        """Return `block` as it is stored: contiguous, big-endian, 0 for no data."""
        if self._unsigned:
            values = np.nan_to_num(block, nan=0.0, posinf=0.0, neginf=0.0)
            return (np.clip(np.rint(values), 0, 65535) - 32768).astype(">i2", order="C")
        values = np.ascontiguousarray(block, np.float32)
        if sys.byteorder == "big":
            return np.where(np.isfinite(values), values, np.float32(0))
        from zemosaic_kernels import stored_bytes

        out = np.empty(values.shape, np.uint32)
        stored_bytes(values.reshape(-1, values.shape[-1]), out.reshape(-1, values.shape[-1]))
        return out.view(">f4")

    def _write_rows(self, start: int, size: tuple[int, int], y0: int, x0: int, values: np.ndarray) -> None:
        """Write (h, w) or (h, w, C) stored values into the plane of `size` that begins at byte `start`."""
        rows, columns = values.shape[:2]
        if not (0 <= y0 <= y0 + rows <= size[0] and 0 <= x0 <= x0 + columns <= size[1]):
            raise ValueError(f"a block of {rows} x {columns} at ({y0}, {x0}) lies outside {size}")
        if values.size == 0:
            return
        pixel = values.nbytes // (rows * columns)
        first = start + (y0 * size[1] + x0) * pixel
        pieces = values[None] if columns == size[1] else values
        with self._told():
            for number, piece in enumerate(pieces):
                self._write_at(first + number * size[1] * pixel, piece)

    def _write_at(self, offset: int, data: bytes | np.ndarray) -> None:
        """Write all of `data` at a byte offset; the system may take it in several portions."""
        view = memoryview(data if isinstance(data, bytes) else data.reshape(-1).view(np.uint8))
        while len(view):
            if hasattr(os, "pwrite"):
                done = os.pwrite(self._file.fileno(), view, offset)
            else:
                with self._lock:
                    self._file.seek(offset)
                    done = self._file.write(view)
            offset += done
            view = view[done:]
