"""The finished blocks of a mosaic in the making.

A block is used again only where what stands on disk tells the whole of it: its values are those of the file, and NaN
where its weight is 0. That does not hold for rounded values (``save_final_as_uint16``), nor for a block with an
infinite value, and the engine "reproject" makes no blocks: there the mosaic is made afresh.
"""

from __future__ import annotations

from pathlib import Path

from zemosaic_pipeline.arrays import Rect
from zemosaic_pipeline.resume.checkpoints import Checkpoints, NothingKept


class BlockJournal:
    """The finished blocks of one mosaic, whose files wait among the checkpoints until it is complete.

    Parameters
    ----------
    kept : Checkpoints
    product : str
        ``science`` or ``aesthetic``: the step.
    fingerprint : str
        Fingerprint of all that the blocks' bits depend on.

    Attributes
    ----------
    left : dict
        Blocks of an earlier run, (y0, y1, x0, x1) -> checksums of what was written.
    """

    def __init__(self, kept: Checkpoints, product: str, fingerprint: str) -> None:
        self._kept, self.product, self._fingerprint = kept, product, fingerprint
        self._files = (product, "coverage", "aesthetic") if product == "science" else (product,)
        self.left: dict[Rect, list[int]] = {
            _block(key): value for key, value in kept.notes(product, fingerprint).items()
        }

    def part(self, name: str) -> Path | None:
        """Where the file ``name`` of this mosaic is made."""
        return self._kept.part(name)

    def start_afresh(self) -> None:
        """What was known of the blocks is void, and so is what was made of them."""
        self.left = {}
        for name in self._files:
            self._kept.forget(name)

    def remove_files(self) -> None:
        """Make room for new files."""
        for name in self._files:
            self._kept.remove_part(name)

    def add(self, block: Rect, checksums: list[int]) -> None:
        """A block was written, and the files tell the whole of it."""
        self._kept.note(self.product, " ".join(map(str, block)), self._fingerprint, checksums)

    def use(self, blocks: int) -> None:
        self._kept.use(self.product, blocks)

    def damaged(self, block: Rect) -> None:
        y0, y1, x0, x1 = block
        self._kept.damaged(f"the {self.product} mosaic", f"rows {y0} to {y1}, columns {x0} to {x1}")


def _block(key: str) -> Rect:
    y0, y1, x0, x1 = map(int, key.split())
    return y0, y1, x0, x1


def block_journal(kept: NothingKept, product: str, fingerprint: str) -> BlockJournal | None:
    """The journal of a mosaic; None where nothing is kept."""
    return BlockJournal(kept, product, fingerprint) if isinstance(kept, Checkpoints) else None
