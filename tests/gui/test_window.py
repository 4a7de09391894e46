"""A window of our own, built as the graphical interface is: it must stay responsive whatever the worker says."""

from __future__ import annotations

import os
import queue as queues
import sys
import time
from pathlib import Path

import pytest

from scenes.small_scene import product, write_scene
from stand_ins import gui_start

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
try:
    from PySide6 import QtCore as CORE
    from PySide6 import QtWidgets as WIDGETS
except ImportError as error:
    wanted = "pip install PySide6-Essentials; on Linux also libegl1 libgl1 libglib2.0-0 libfontconfig1 libxkbcommon0"
    pytest.skip(f"NO WINDOW IS TESTED: {error} ({wanted} libdbus-1-3)", allow_module_level=True)
if CORE.QLibraryInfo.version() >= CORE.QVersionNumber(6, 12) and sys.version_info < (3, 12):
    pytest.skip(
        "NO WINDOW IS TESTED: PySide6 6.12 loses references to True and None with Python before 3.12, and aborts "
        "(pip install 'PySide6-Essentials<6.12')",
        allow_module_level=True,
    )

HEARTBEAT = 10  # ms
LONGEST_BLOCK = 0.1  # s


class Listener(CORE.QThread):
    """Reads the queue until the process is gone, and hands every message to the window's thread."""

    heard = CORE.Signal(object)

    def __init__(self, run: gui_start.GuiProcess) -> None:
        super().__init__()
        self._run = run

    def run(self) -> None:
        alive = True
        while alive:
            alive = self._run.process.is_alive()
            try:
                while True:
                    self.heard.emit(self._run.queue.get(timeout=0.05))
            except queues.Empty:
                pass


class Window(WIDGETS.QWidget):
    """A log, a bar and some labels; it takes down how long its messages block the event loop.

    Attributes
    ----------
    messages : list of tuple
    blocked : float
        Most seconds of work for messages between two beats of a timer. The processor's time, not the clock's: other
        programs on the machine must not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[tuple] = []
        self.blocked = self._since_beat = 0.0
        self._log, self._bar, self._label = WIDGETS.QPlainTextEdit(), WIDGETS.QProgressBar(), WIDGETS.QLabel()
        layout = WIDGETS.QVBoxLayout(self)
        for widget in (self._log, self._bar, self._label):
            layout.addWidget(widget)
        self._timer = CORE.QTimer(self)
        self._timer.timeout.connect(self._beat)
        self._timer.start(HEARTBEAT)

    def _beat(self) -> None:
        self.blocked, self._since_beat = max(self.blocked, self._since_beat), 0.0

    def take(self, message: tuple) -> None:
        """The slot of every message."""
        began = time.thread_time()
        self._show(message)
        self._since_beat += time.thread_time() - began

    def _show(self, message: tuple) -> None:
        self.messages.append(message)
        key, progress, level, fields = message
        if key == "STAGE_PROGRESS":
            self._bar.setRange(0, fields["total"])
            self._bar.setValue(level)
            self._label.setText(f"{progress} {level}")
        elif level in ("ETA_LEVEL", "CHRONO_LEVEL"):
            self._label.setText(key)
        else:
            colour = {"WARN": "orange", "ERROR": "red", "SUCCESS": "green"}.get(level, "black")
            self._log.appendHtml(f'<span style="color:{colour}">[{level}] {key} {fields}</span>')


@pytest.fixture(scope="session")
def application():
    """The one application of this process."""
    return WIDGETS.QApplication.instance() or WIDGETS.QApplication([])


def watch(application, run: gui_start.GuiProcess, busy: bool = False) -> Window:
    """Show a run in a window until its process is gone; a busy one finds all messages at once, when it comes back."""
    window, listener = Window(), Listener(run)
    listener.heard.connect(window.take, CORE.Qt.ConnectionType.QueuedConnection)
    listener.finished.connect(application.quit, CORE.Qt.ConnectionType.QueuedConnection)
    window.show()
    listener.start()
    if busy:
        listener.wait()
    application.exec()
    listener.wait()
    application.processEvents()
    window._beat()
    run.process.join()
    window.close()
    return window


def test_a_window_follows_a_run(application, tmp_path):
    write_scene(tmp_path / "in")
    run = gui_start.start(**gui_start.snapshot(tmp_path / "in", tmp_path / "out"))
    window = watch(application, run)
    gui_start.check_protocol(window.messages, "done")
    assert run.process.exitcode == 0 and product(tmp_path / "out", "preview").is_file()
    assert window.blocked < LONGEST_BLOCK


def test_fifty_thousand_messages_do_not_block_the_window(application, tmp_path):
    window = watch(application, gui_start.start(gui_start.chatty, output_dir=str(tmp_path), limited=True), busy=True)
    assert window.messages[-1][0] == "PROCESS_DONE"
    gui_start.check_stages(window.messages, complete=True)
    assert 100 < len(window.messages) < 500
    assert window.blocked < LONGEST_BLOCK


def test_without_the_limits_they_would(application, tmp_path: Path):
    """The test above can fail: the same messages, all of them, in one piece as a busy window finds them."""
    run = gui_start.start(gui_start.chatty, output_dir=str(tmp_path), limited=False).listen_to_the_end()
    assert len(run.messages) > 50_000
    window = Window()
    for message in run.messages:
        window.take(message)
    window._beat()
    assert window.blocked > LONGEST_BLOCK
