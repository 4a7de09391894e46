"""Where finished blocks go: the files, the preview, the coarse coverage, and the journal for a resume."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy.io import fits

from zemosaic_photometry import PhotometricSolution
from zemosaic_pipeline.arrays import Rect
from zemosaic_pipeline.fits.preview import PreviewAccumulator
from zemosaic_pipeline.fits.writer import MosaicWriter
from zemosaic_pipeline.host.threads import run_parallel
from zemosaic_pipeline.phases.phase5_normalise import Scene
from zemosaic_pipeline.phases.phase5_sky_plane import SkyPlane
from zemosaic_pipeline.resume.journal import BlockJournal
from zemosaic_pipeline.settings.settings import Settings


@dataclass(frozen=True)
class Coverage:
    """Coverage averaged over cells of ``bin`` squared pixels, float32 (h, w)."""

    mean: np.ndarray
    bin: int


@dataclass(frozen=True)
class ColourAdjustment:
    """Turns a science block (C, h, w) into an aesthetic one: ``(values - plane) * gain - black``, gain (C, 1, 1)."""

    gain: np.ndarray
    black: np.float32
    plane: SkyPlane | None = None

    def __call__(self, y0: int, x0: int, values: np.ndarray) -> np.ndarray:
        """The block whose first pixel is the mosaic's (y0, x0), float32."""
        if self.plane is not None:
            values = values - self.plane.block(y0, x0, values.shape[1:])
        return values * self.gain - self.black

    @property
    def numbers(self) -> tuple[np.ndarray, float, list[np.ndarray] | None]:
        """What the result depends on."""
        return self.gain, float(self.black), self.plane and self.plane.numbers


@dataclass(frozen=True)
class Product:
    """One mosaic that is to be written.

    Attributes
    ----------
    name : {"science", "aesthetic"}
    solution : PhotometricSolution
        Of the scene's tiles.
    image, header
        The mosaic's file and its header.
    coverage : (path, header), optional
        Where the sum of weights goes.
    preview : Path, optional
        Where the picture goes.
    adjust : ColourAdjustment, optional
        Applied to every finished block.
    """

    name: str
    solution: PhotometricSolution
    image: Path
    header: fits.Header
    coverage: tuple[Path, fits.Header] | None = None
    preview: Path | None = None
    adjust: ColourAdjustment | None = None


class Canvas:
    """Takes finished blocks from any thread: writes them and keeps the preview and the coarse coverage.

    Parameters
    ----------
    image : MosaicWriter
    coverage : MosaicWriter, optional
    preview : PreviewAccumulator
    binned : PreviewAccumulator, optional
        Of the coverage.
    full_weight : float
        Weight of one whole tile.
    adjust : ColourAdjustment, optional
        Applied to every finished block.
    journal : BlockJournal, optional
        Where finished blocks are noted, and those of an earlier run are found.
    """

    def __init__(
        self,
        image: MosaicWriter,
        coverage: MosaicWriter | None,
        preview: PreviewAccumulator,
        binned: PreviewAccumulator | None,
        full_weight: float,
        adjust: ColourAdjustment | None,
        journal: BlockJournal | None,
    ) -> None:
        self._image, self._coverage = image, coverage
        self.preview, self._binned = preview, binned
        self._full_weight = full_weight
        self._adjust = adjust
        self._journal = journal
        self._pixels_done = 0
        self._lock = threading.Lock()

    def put(self, block: Rect, values: np.ndarray, weights: np.ndarray) -> None:
        """One finished block: values (C, h, w) with NaN for "no data", weights (h, w)."""
        y0, x0 = block[0], block[2]
        if self._adjust is not None:
            values = self._adjust(y0, x0, values)
        checksums = [
            self._image.write_block(y0, x0, values if len(values) > 1 else values[0]),
            self._image.write_alpha(y0, x0, alpha_of(weights, self._full_weight)),
        ]
        if self._coverage is not None:
            checksums.append(self._coverage.write_block(y0, x0, weights))
        if self._journal is not None and is_recoverable(values, weights):
            self._journal.add(block, checksums)
        self._show(block, values, weights)

    def restore(self, jobs: int, cancelled: Callable[[], bool], count: Callable[[], None]) -> list[Rect]:
        """Take over the blocks of an earlier run that stand undamaged in the files; returns them."""
        journal = self._journal
        if journal is None or not journal.left:
            return []
        left = sorted(journal.left.items())

        def take(item: tuple[Rect, list[int]]) -> Rect | None:
            block, checksums = item
            found = self._read(block, checksums)
            if found is None:
                journal.damaged(block)
                return None
            self._show(block, *found)
            count()
            return block

        done = [block for block in run_parallel(take, left, jobs, cancelled) if block is not None]
        journal.use(len(done))
        return done

    def _read(self, block: Rect, checksums: list[int]) -> tuple[np.ndarray, np.ndarray] | None:
        """Values and weights of a block as they were given to :meth:`put`; None where the files hold something else.

        Without a file of the coverage the weights are those of ALPHA, of which only the zeros are right.
        """
        y0, x0 = block[0], block[2]
        size = (block[1] - y0, block[3] - x0)
        values, first = self._image.read_block(y0, x0, size)
        weights, second = self._image.read_alpha(y0, x0, size)
        found = [first, second]
        if self._coverage is not None:
            cover, third = self._coverage.read_block(y0, x0, size)
            weights, found = cover[0], [*found, third]
        if found != checksums:
            return None
        values[:, weights == 0] = np.nan
        return values, weights

    def _show(self, block: Rect, values: np.ndarray, weights: np.ndarray) -> None:
        """What is kept of a block in memory."""
        self.preview.add(block[0], block[2], values)
        if self._binned:
            self._binned.add(block[0], block[2], weights[None])
        with self._lock:
            self._pixels_done += weights.size

    def rows_done(self, width: int) -> int:
        """How many rows of that width the finished blocks would fill."""
        return self._pixels_done // width

    def coarse_coverage(self) -> Coverage | None:
        return Coverage(self._binned.image()[0], self._binned.factor) if self._binned else None


def open_canvas(
    stack: ExitStack, product: Product, scene: Scene, settings: Settings, journal: BlockJournal | None
) -> Canvas:
    """Lay out the files, or take up those of an earlier run; they are complete when ``stack`` closes."""
    shape, channels = scene.grid.shape, scene.channels
    resume = journal is not None and bool(journal.left)
    if journal is not None and not resume:
        journal.start_afresh()
        journal.remove_files()
    image = stack.enter_context(
        MosaicWriter(
            product.image,
            product.header,
            (channels, *shape) if channels > 1 else shape,
            "u2" if settings.save_final_as_uint16 else "f4",
            alpha_shape=shape,
            interleaved=settings.legacy_rgb_cube,
            waiting=journal and journal.part(product.name),
            resume=resume,
        )
    )
    coverage = None
    if product.coverage is not None:
        waiting = journal and journal.part("coverage")
        coverage = stack.enter_context(MosaicWriter(*product.coverage, shape, waiting=waiting, resume=resume))
    whole = image.resumed and (coverage is None or coverage.resumed)
    if journal is not None and resume and not whole:
        journal.start_afresh()
    binned = None
    if settings.two_pass_coverage_renorm and coverage is not None:
        cell = max(1, int(settings.two_pass_cov_sigma_px / 8))
        binned = PreviewAccumulator(shape, 1, -(-max(shape) // cell))
    preview = PreviewAccumulator(shape, channels, settings.preview_png_max_dim)
    full_weight = min(item.weight for item in scene.placed)
    return Canvas(image, coverage, preview, binned, full_weight, product.adjust, journal)


def is_recoverable(values: np.ndarray, weights: np.ndarray) -> bool:
    """Whether the files tell the whole of a block: finite values exactly where there is weight (elsewhere NaN)."""
    return np.count_nonzero(np.isfinite(values)) == len(values) * np.count_nonzero(weights)


def alpha_of(weights: np.ndarray, full_weight: float) -> np.ndarray:
    """ALPHA (uint8): 0 where nothing was seen, 255 where the weight is ``full_weight`` or more, at least 1 in between."""
    alpha = np.clip(np.rint(weights * np.float32(255.0 / full_weight)), 1, 255).astype(np.uint8)
    alpha[weights == 0] = 0
    return alpha
