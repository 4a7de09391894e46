"""What the terminal shows of a run: a bar, plain lines, or JSON; and its warnings, kept for the end."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, TextIO

from zemosaic_pipeline.host.progress import STAGES, Listener, StageCount, stage_count

if TYPE_CHECKING:
    from tqdm import tqdm


def to_all(*listeners: Listener) -> Listener:
    """One listener that passes every message on to all of these, in turn."""

    def tell(key: str, progress: str | None, level: str | int, /, **fields: Any) -> None:
        for listener in listeners:
            listener(key, progress, level, **fields)

    return tell


class WarningTexts:
    """Keeps the texts of all warnings, for the end of the output."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, key: str, progress: str | None, level: str | int, /, **fields: Any) -> None:
        if level == "WARN":
            self.texts.append(fields["text"])


class TerminalBar:
    """A progress bar with phase, rate and time left on a terminal; plain lines elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bar: tqdm | None = None
        self._stage = ""

    def __call__(self, key: str, progress: str | None, level: str | int, /, **fields: Any) -> None:
        if count := stage_count(key, progress, level, fields):
            self._count(count)
        elif level in ("SUCCESS", "ERROR"):  # warnings are listed at the end
            self._line(("error: " if level == "ERROR" else "") + fields.get("text", key))

    def _count(self, count: StageCount) -> None:
        if count.stage != self._stage:
            self.close()
            self._begin(count)
        if self._bar is not None:
            self._bar.total = count.total
            self._bar.update(count.current - self._bar.n)
            self._bar.refresh()
            if count.current >= count.total:  # lines that follow stand below it
                self.close()

    def _begin(self, count: StageCount) -> None:
        self._stage = count.stage
        phase, title, unit = STAGES[count.stage]
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=count.total, desc=f"[{phase}/7] {title}", unit=f" {unit}", file=self._stream)
        else:
            self._line(f"[{phase}/7] {title}")

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

    def __call__(self, key: str, progress: str | None, level: str | int, /, **fields: Any) -> None:
        count = stage_count(key, progress, level, fields)
        message = {"level": level, "key": key, **fields} if count is None else count._asdict()
        print(json.dumps(message, default=str), file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing to finish."""
