"""What the README says is what happens: its commands are run, its answers are looked at, its table is up to date."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from server import Server

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def at(server: Server, text: str) -> str:
    assert "127.0.0.1:8000" in text
    return text.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")


def test_the_curl_example_answers(server: Server) -> None:
    (command,) = [block for block in blocks("bash") if block.startswith("curl")]
    done = subprocess.run(["bash", "-c", at(server, command)], capture_output=True, text=True, check=True)
    assert '"object":"chat.completion"' in done.stdout
    assert "quanti" in done.stdout and "4 bit" in done.stdout.replace("4-bit", "4 bits")


def test_the_sdk_example_streams_the_right_answer(server: Server) -> None:
    (code,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", at(server, code)], capture_output=True, text=True, check=True)
    assert "1, 2, 3, 4, 5, 6, 7, 8, 9, 10" in done.stdout


def test_the_settings_table_is_up_to_date() -> None:
    check = [sys.executable, str(ROOT / "tools" / "settings_table.py"), "--check"]
    assert subprocess.run(check, check=False).returncode == 0, "run tools/settings_table.py"
    rows = README.split("| flag | default | |\n")[1].split("<!-- end")[0].splitlines()
    assert all(row.startswith("|") and row.endswith("|") for row in rows), "a row in two lines is no table"


def test_its_files_and_make_targets_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE) or target in ("a",), target


def test_every_flag_it_names_exists() -> None:
    from gptq_api.config import ALL_SETTINGS, flag

    known = {flag(name) for kind in ALL_SETTINGS for name in kind.model_fields}
    named = {
        item
        for block in blocks("bash")
        for line in block.splitlines()
        if "gptq-api " in line and "docker" not in line
        for item in re.findall(r"(?<!\S)--[a-z0-9-]+", line)
    }
    assert named and named <= known, named - known
