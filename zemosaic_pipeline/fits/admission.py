"""The input folder: which of its files are panels, and why the others are not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from astropy.io import fits

from zemosaic_pipeline.errors import UnsolvedImage, UnusableFile
from zemosaic_pipeline.fits.find import SetAside, find_fits_files
from zemosaic_pipeline.fits.headers import BROKEN, PRODUCT_KEYWORD, hdu_at, quiet
from zemosaic_pipeline.fits.tile import Tile, open_tile

_PRODUCT_NAME = re.compile(r"^zemosaic_MT\d+_R\d+_(science|aesthetic|coverage)\.fits(\.(fz|gz))*$", re.IGNORECASE)
#: Folder of the output where Phase 3 puts its master tiles.
MASTER_TILES = "master_tiles"


class RawFrame(UnusableFile):
    """The input holds raw frames, or images that are yet to be solved, and no panels."""


def is_own_product(path: Path | str) -> bool:
    """Tell whether a file is a mosaic that this program wrote; a file that cannot be read is none.

    Known by the keyword ZMPROD, or the name ``zemosaic_MT*_R*_*.fits`` of a science, aesthetic or coverage
    image.
    """
    path = Path(path)
    if _PRODUCT_NAME.match(path.name):
        return True
    try:
        with quiet(), fits.open(path, memmap=False) as hdul:
            primary = hdu_at(hdul, 0).header
            if PRODUCT_KEYWORD in primary:
                return True
            # a compressed copy has an empty primary HDU and its header in the first extension
            return primary.get("NAXIS") == 0 and PRODUCT_KEYWORD in hdu_at(hdul, 1).header
    except BROKEN:
        return False


def scan_tiles(
    input_dir: Path | str,
    scratch_dir: Path | str,
    output_dir: Path | str | None = None,
    progress: Callable[[int, int], object] | None = None,
    raw_ends: bool = False,
) -> tuple[list[Tile], list[SetAside]]:
    """Open every FITS file below `input_dir`; what cannot be used is set aside with its reason.

    Parameters
    ----------
    input_dir : Path or str
        The folder of the panels.
    scratch_dir : Path or str
        An existing folder for unpacked ``.gz`` files, to be removed after the last tile was read.
    output_dir : Path or str, optional
        Where the mosaic goes; where it lies below `input_dir`, its files are no input.
    progress : callable, optional
        Called as ``progress(done, total)`` before the first file and after each.
    raw_ends : bool
        A raw frame ends the scan with `RawFrame`, and so do images none of which has a WCS.

    Returns
    -------
    list of Tile
        Sorted by path; all mono or all RGB, whichever are more (RGB where they are as many).
    list of SetAside
        What is not used.

    Raises
    ------
    UsageError
        `input_dir` cannot be used at all.
    RunError
        The disk is full while a file is unpacked.
    RawFrame
        With `raw_ends`, see there.
    """
    root = Path(input_dir)
    aside: list[SetAside] = []
    files = {path.relative_to(root).as_posix(): path for path in find_fits_files(root, problems=aside)}
    own = [Path(scratch_dir)]
    if raw_ends and output_dir is not None and not _lies_in(root / "x", Path(output_dir) / MASTER_TILES):
        own.append(Path(output_dir) / MASTER_TILES)  # made of frames that may lie here, too
    files = {name: path for name, path in files.items() if not any(_lies_in(path, folder) for folder in own)}
    if output_dir is not None and _lies_in(root / "x", output_dir):
        output_dir = None  # all panels lie in it
    tiles: list[Tile] = []
    unsolved: UnsolvedImage | None = None
    if progress:
        progress(0, len(files))
    for done, (name, path) in enumerate(files.items(), start=1):
        try:
            tiles.append(_panel(path, name, scratch_dir, output_dir))
        except UnusableFile as error:
            if raw_ends and (isinstance(error, RawFrame) or getattr(error, "raw", False)):
                raise RawFrame(error.path, error.reason) from error
            unsolved = error if isinstance(error, UnsolvedImage) else unsolved
            aside.append(SetAside(name, error.reason))
        if progress:
            progress(done, len(files))
    if raw_ends and not tiles and unsolved is not None:
        raise RawFrame(unsolved.path, unsolved.reason)
    return _same_channels(tiles, aside)


def _lies_in(path: Path, folder: Path | str) -> bool:
    return Path(folder).resolve() in path.resolve().parents


def _panel(path: Path, name: str, scratch_dir: Path | str, output_dir: Path | str | None) -> Tile:
    """Open one file of the input folder as a panel, or raise `UnusableFile`."""
    if output_dir is not None and _lies_in(path, output_dir):
        raise UnusableFile(path, "lies in the output folder")
    if is_own_product(path):
        raise UnusableFile(path, "is a mosaic of an earlier run, which is not used as input")
    tile = open_tile(path, name, scratch_dir)
    if tile.raw_sub:
        raise RawFrame(path, "is a raw sub of a colour sensor (BAYERPAT), not a stacked panel")
    return tile


def _same_channels(tiles: list[Tile], aside: list[SetAside]) -> tuple[list[Tile], list[SetAside]]:
    """Keep the tiles with the commoner number of channels."""
    counts = Counter(tile.channels for tile in tiles)
    if len(counts) < 2:
        return tiles, aside
    wanted = 3 if counts[3] >= counts[1] else 1
    kind = {1: "mono", 3: "RGB"}
    odd = [
        SetAside(t.name, f"is {kind[t.channels]}, while most tiles are {kind[wanted]}")
        for t in tiles
        if t.channels != wanted
    ]
    return [tile for tile in tiles if tile.channels == wanted], aside + odd
