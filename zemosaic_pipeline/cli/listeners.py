"""What the terminal shows of a run: a bar, plain lines, or JSON."""

from __future__ import annotations

import json
import sys
from typing import Any, TextIO

from zemosaic_pipeline.host.progress import STAGES


class TerminalBar:
    """A progress bar with phase, rate and time left on a terminal; plain lines elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bar: Any = None
        self._stage = ""

    def __call__(self, key: str, progress: Any, level: Any, **fields: Any) -> None:
        if key == "STAGE_PROGRESS":
            self._count(progress, level, fields["total"])
        elif level in ("SUCCESS", "ERROR"):  # warnings are listed at the end
            self._line(("error: " if level == "ERROR" else "") + fields.get("text", key))

    def _count(self, stage: str, current: int, total: int) -> None:
        phase, title, unit = STAGES[stage]
        if stage != self._stage:
            self.close()
            self._stage = stage
            if self._stream.isatty():
                from tqdm import tqdm

                self._bar = tqdm(total=total, desc=f"[{phase}/7] {title}", unit=f" {unit}", file=self._stream)
            else:
                self._line(f"[{phase}/7] {title}")
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(current - self._bar.n)
            self._bar.refresh()
            if current >= total:  # lines that follow stand below it
                self.close()

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Finish the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class JsonLines:
    """Every message as one JSON object a line on a stream, for programs that drive the command line."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout

    def __call__(self, key: str, progress: Any, level: Any, **fields: Any) -> None:
        if key == "STAGE_PROGRESS":
            message = {"stage": progress, "current": level, "total": fields["total"]}
        else:
            message = {"level": level, "key": key, **fields}
        print(json.dumps(message, default=str), file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing to finish."""
