"""Writes the settings table of README.md from gptq_api.config.Settings; `--check` says whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args

from gptq_api.config import ENV_PREFIX, Settings, flag

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- settings: written by tools/settings_table.py -->\n", "<!-- end of settings -->\n"


def default_of(value: Any) -> str:
    return "" if value is None or value == [] else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def choices_of(annotation: Any) -> str:
    values = [
        str(item)
        for arg in (annotation, *get_args(annotation))
        for item in get_args(arg)
        if isinstance(item, str | int)
    ]
    values = [item for item in dict.fromkeys(values) if not item.startswith("<")]
    return " (" + ", ".join(values) + ")" if values else ""


def table() -> str:
    rows = [f"Environment: `{ENV_PREFIX}` and the name in capitals, such as `{ENV_PREFIX}MAX_NUM_SEQS`.", ""]
    rows += ["| flag | default | |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        text = " ".join((field.description or "").split()) + choices_of(field.annotation)
        rows.append(f"| `{flag(name)}` | {default_of(field.get_default(call_default_factory=True))} | {text} |")
    return "\n".join(rows) + "\n"


def with_table(readme: str) -> str:
    head, rest = readme.split(BEGIN)
    return head + BEGIN + table() + END + rest.split(END)[1]


def main() -> int:
    current = README.read_text(encoding="utf-8")
    wanted = with_table(current)
    if "--check" in sys.argv[1:]:
        return int(current != wanted)
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
