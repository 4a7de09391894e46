"""What README and docs say can be followed: links, files, commands, options, settings and names exist."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from zemosaic_pipeline.cli.main import build_parser
from zemosaic_pipeline.settings.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OURS = re.compile(r"(?:zemosaic-worker|zemosaic_worker\.py)\b|^--")
OPTIONS = {option for action in build_parser()._actions for option in action.option_strings if option != "-h"}
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def code(text: str) -> list[str]:
    """Commands and names in code formatting: lines of blocks, cut at &&, and spans."""
    lines = [line for _, block in FENCED.findall(text) for line in block.splitlines()]
    return [part.strip() for line in lines for part in line.split("&&")] + re.findall(
        r"`([^`\n]+)`", FENCED.sub("", text)
    )


def prose(text: str) -> str:
    """The text without its code."""
    return re.sub(r"`[^`\n]+`", "", FENCED.sub("", text))


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(text))


def anchors(text: str) -> set[str]:
    """The anchors that a reader's browser makes of the headings."""
    found: list[str] = []
    for title in re.findall(r"^#+ +(.+?) *$", FENCED.sub("", text), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


@every_page
def test_links_lead_somewhere(page):
    for link in links(TEXT[page]):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(TEXT[target]), f"{page.name}: {link}"


def test_every_page_is_linked_from_the_readme():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(TEXT[ROOT / "README.md"])}
    assert set(PAGES) - {ROOT / "README.md"} <= linked


def test_readme_is_short():
    assert len(TEXT[ROOT / "README.md"].splitlines()) <= 200


@every_page
def test_options_exist(page):
    """Options of our command line exist in its parser, those of a benchmark in its source."""
    for text in code(TEXT[page]):
        flags = re.findall(r"(?<!\S)(--[a-z][a-z-]*)", text)
        if script := re.search(r"\bbenchmarks/\w+\.py", text):
            source = (ROOT / script[0]).read_text(encoding="utf-8")
            assert all(f'"{flag}"' in source for flag in flags), f"{page.name}: {text}"
        elif OURS.search(text):
            assert set(flags) <= OPTIONS, f"{page.name}: {text}"


def test_every_option_is_described():
    described = code(TEXT[ROOT / "docs/running.md"])
    assert not {option for option in OPTIONS if not any(re.match(rf"{option}(?![\w-])", text) for text in described)}


@every_page
def test_settings_can_be_set(page):
    """Every ``--set KEY=VALUE`` that is written out is accepted."""
    for key, value in re.findall(r"--set ([a-z]\w+)=([\w.,]+)", TEXT[page]):
        Settings.from_mapping({key: value}, page.name)


@every_page
def test_files_and_modules_exist(page):
    """Files are named from the root or from the package's folder, modules in full."""
    for text in code(TEXT[page]):
        for name in re.findall(r"(?<![\w./])(?:[\w.]+/)+\w+\.(?:py|md|json)\b|\.ci/\w+", text):
            found = [folder / name for folder in (ROOT, ROOT / "zemosaic_pipeline") if (folder / name).is_file()]
            assert found, f"{page.name}: {name}"
        for name in re.findall(r"\bpython3? -m ([\w.]+)|\b(zemosaic_pipeline\.[\w.]+)", text):
            assert exists("".join(name)), f"{page.name}: {name}"


def exists(name: str) -> bool:
    """Whether `name` is a module, or something in one."""
    module, _, attribute = name.rpartition(".")
    return importlib.util.find_spec(name) is not None or hasattr(importlib.import_module(module), attribute)


@every_page
def test_examples_in_python_find_what_they_import(page):
    for language, block in FENCED.findall(TEXT[page]):
        for node in ast.walk(ast.parse(block)) if language == "python" else ():
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), f"{page.name}: {node.module}"


def test_newest_entry_of_the_changelog_is_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    newest = re.search(r"^## \[(.+?)\]", TEXT[ROOT / "CHANGELOG.md"], re.MULTILINE)
    assert newest, "no entry"
    assert newest[1] in {version, "Unreleased"}
