"""Pages for contributors name files that exist."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptq_api import exits
from tests.support.fields import case_of
from tools import fields_table

ROOT = Path(__file__).parents[1]
ENDS = (".py", ".md", ".cu", ".h", ".cuh", ".cpp", ".txt", ".toml", ".json", ".yaml", "/")


def spelled_out(text: str) -> Iterator[str]:
    """`a/{b,c}.py` -> a/b.py, a/c.py"""
    found = re.search(r"\{([^}]*)\}", text)
    if found is None:
        yield text
    else:
        for part in found[1].split(","):
            yield from spelled_out(text[: found.start()] + part + text[found.end() :])


def paths_of(page: str) -> set[str]:
    """Words of code, also within commands, that are written as paths."""
    code = re.findall(r"`([^`\n]+)`", page)
    return {
        path
        for span in code
        for word in span.split()
        for path in spelled_out(word)
        if (path.endswith(ENDS) or re.fullmatch(r"[\w.]+(/[\w.]+)+", path)) and "=" not in path and "*" not in path
    }


@pytest.mark.parametrize("name", ["contributing.md"])
def test_every_path_exists(name: str) -> None:
    paths = paths_of((ROOT / "docs" / name).read_text(encoding="utf-8"))
    assert len(paths) > 60
    missing = [path for path in sorted(paths) if not ((ROOT / path).exists() or (ROOT / "gptq_api" / path).exists())]
    assert not missing


def test_every_exit_status_is_in_the_table() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    told = {int(status) for status in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    statuses = {value for name, value in vars(exits).items() if name.isupper()}
    assert told == statuses | {exits.cut_short(signal.SIGTERM), exits.cut_short(signal.SIGINT)}


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_a_wish_counts_the_files_it_names() -> None:
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w ]+) \| (\d+) \| (.*) \|$", page.split("## How far")[1], re.MULTILINE)
    assert len(rows) == 6
    for wish, count, text in rows:
        files = re.split(r"\.(?= |$)", re.sub(r"`[^`]*`", lambda match: match[0].replace(".", "\0"), text))[0]
        assert len(paths_of(files.replace("\0", "."))) == int(count), wish


def test_the_commands_are_targets() -> None:
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([\w-]+)", page):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_table_of_fields_is_up_to_date() -> None:
    assert fields_table.PAGE.read_text(encoding="utf-8") == fields_table.page(), "run: python tools/fields_table.py"


def test_each_field_has_a_case() -> None:
    for route, model in fields_table.MODELS.items():
        for name in model.model_fields:
            case_of(route, name)  # a new field needs one in tests/support/fields.py
