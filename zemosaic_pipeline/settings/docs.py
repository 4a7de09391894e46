"""The tables of docs/settings.md, made from `settings.settings`; a test keeps that page up to date.

``python -m zemosaic_pipeline.settings.docs`` prints them; with ``--update docs/settings.md`` it writes them into that
file, between its markers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from zemosaic_pipeline.errors import UsageError, ZeMosaicError
from zemosaic_pipeline.settings.fields import Setting
from zemosaic_pipeline.settings.gui_keys import FOREIGN_KEYS
from zemosaic_pipeline.settings.settings import SETTINGS
from zemosaic_pipeline.settings.values import format_size

SETTINGS_BEGIN = "<!-- settings:begin -->"
SETTINGS_END = "<!-- settings:end -->"


def _show_default(row: Setting, value: Any) -> str:
    if value is None:
        return "auto"
    if row.kind == "size":
        return format_size(value)
    if isinstance(value, tuple):
        return ",".join(f"{v:g}" for v in value)
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value != "" else "empty"


def _setting_row(row: Setting) -> str:
    meaning = row.meaning + (f" ({', '.join(row.choices)})" if row.choices else "")
    gui = "honoured" if row.in_gui else "has it not"
    if row.gui_default is not None:
        gui = f"honoured; its default is {_show_default(row, row.gui_default)}"
    cells = (f"`{row.key}`", f"`{_show_default(row, row.default)}`", row.unit, meaning, gui)
    return "| " + " | ".join(cells) + " |"


def settings_table_markdown() -> str:
    """Return the two tables: the settings, and what becomes of the GUI's other keys."""
    lines = ["| setting | default | unit | meaning | GUI |", "|---|---|---|---|---|"]
    lines += [_setting_row(row) for row in SETTINGS]
    lines += ["", "Every other key of the GUI's configuration:", ""]
    lines += ["| keys | status | to what, or why not |", "|---|---|---|"]
    groups: dict[tuple[str, str], list[str]] = {}
    for key, row in sorted(FOREIGN_KEYS.items()):
        groups.setdefault((row.status, row.why), []).append(f"`{key}`")
    order = {"translated": 0, "ignored": 1}
    for (status, why), keys in sorted(groups.items(), key=lambda item: (order[item[0][0]], item[1][0])):
        lines.append(f"| {', '.join(keys)} | {status} | {why} |")
    return "\n".join(lines) + "\n"


def update_markdown(text: str) -> str:
    """Return `text` with the tables between its two settings markers brought up to date.

    Raises
    ------
    UsageError
        If the markers are not there.
    """
    head, begin, rest = text.partition(SETTINGS_BEGIN)
    _, end, tail = rest.partition(SETTINGS_END)
    if not begin or not end:
        raise UsageError(f"The file has no markers {SETTINGS_BEGIN} and {SETTINGS_END}.")
    return f"{head}{begin}\n{settings_table_markdown()}{end}{tail}"


def main(argv: list[str] | None = None) -> int:
    """Print the tables, or write them into a file between its markers."""
    parser = argparse.ArgumentParser(
        prog="python -m zemosaic_pipeline.settings.docs", description="Print the tables of settings."
    )
    parser.add_argument("--update", type=Path, metavar="docs/settings.md", help="write them between its markers")
    path = parser.parse_args(argv).update
    if path is None:
        print(settings_table_markdown(), end="")
        return 0
    try:
        path.write_text(update_markdown(path.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
    except (ZeMosaicError, OSError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
