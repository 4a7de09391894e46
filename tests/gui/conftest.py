"""What the tests of the window's process share: many small panels, and a whole run on them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from scenes.small_scene import digests, write_scene
from stand_ins.gui_start import snapshot, start
from zemosaic_pipeline.synthetic.panels import Layout

#: Many small panels: every phase lasts some tenths of a second.
MANY = Layout(rows=8, columns=8, shape=(192, 256), overlap=0.3, noise=2.0)


@pytest.fixture(scope="session")
def panels(tmp_path_factory) -> Path:
    """A folder of 64 panels."""
    folder = tmp_path_factory.mktemp("many") / "panels"
    write_scene(folder, layout=MANY)
    return folder


@pytest.fixture(scope="session")
def done(panels, tmp_path_factory) -> SimpleNamespace:
    """A whole run, started as the window does."""
    folder = tmp_path_factory.mktemp("gui") / "new" / "folder"
    before = digests(panels)
    run = start(**snapshot(panels, folder, key_of_version_9=[{}])).listen_to_the_end()
    assert digests(panels) == before
    return SimpleNamespace(run=run, messages=run.messages, folder=folder)
