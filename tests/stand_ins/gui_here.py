"""The window's process without a process: its queue is a list, its engine the test's own."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from zemosaic_pipeline.gui.process import serve


class ListQueue:
    """A queue that keeps what was put."""

    def __init__(self) -> None:
        self.messages: list[tuple] = []

    def put(self, message: tuple, block: bool = True, timeout: float | None = None) -> None:
        pickle.dumps(message)
        self.messages.append(message)


def run_here(engine: Any, tmp_path: Path, *args: Any, queue: Any = None, **kwargs: Any) -> SimpleNamespace:
    """`serve` with an engine of the test's own, in this process."""
    queue = queue or ListQueue()
    folders = {"input_dir": str(tmp_path), "output_dir": str(tmp_path)}
    status = serve(engine, queue, args, folders | kwargs)
    messages = getattr(queue, "messages", [])
    error = next((message[3]["error"] for message in messages if message[0] == "PROCESS_ERROR"), "")
    return SimpleNamespace(status=status, messages=messages, error=error)
