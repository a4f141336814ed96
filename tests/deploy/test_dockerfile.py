"""The Dockerfile beside the tree: what it copies is there and let through, and layers are in the right order."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
STAGES = {
    match[2]: match[3]
    for match in re.finditer(r"^FROM (\S+) AS (\S+)$(.*?)(?=^FROM |\Z)", TEXT, re.MULTILINE | re.DOTALL)
}
ALLOWED = [
    line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")
]


def copied(stage: str) -> list[str]:
    """Paths of the tree."""
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", STAGES[stage], re.MULTILINE)
    return [word for line in lines for word in line.split()]


def test_what_is_copied_is_there_and_let_through() -> None:
    found = {path for stage in STAGES for path in copied(stage)}
    assert len(found) > 8
    for path in found:
        assert (ROOT / path).exists(), path
        assert any(path == allowed or path.startswith(f"{allowed}/") for allowed in ALLOWED), path
    for allowed in ALLOWED:
        assert any(path == allowed or path.startswith(f"{allowed}/") for path in found), f"{allowed} is copied nowhere"


def test_no_change_of_ours_installs_a_library_again() -> None:
    assert set(copied("dependencies")) == {"tools/install.py", "constraints.txt"}
    image = STAGES["image"]
    assert image.index("from=dependencies") < image.index("from=wheel") and "--no-deps" in image


def test_every_stage_begins_with_an_image_that_can_be_named() -> None:
    begins = re.findall(r"^FROM (\S+)", TEXT, re.MULTILINE)
    assert {begin for begin in begins if not begin.startswith("${") and begin not in STAGES} <= {
        "scratch",
        "base-${DEVICE}",
    }


def test_it_names_no_index_and_installs_extras_that_exist() -> None:
    assert "://" not in TEXT
    extras = re.search(r"^ARG EXTRAS=(.*)$", TEXT, re.MULTILINE)
    assert extras is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])
