"""The demo model's folder with some of its files changed: what a stranger might have uploaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptq_api.demo import DEMO_PATH

Json = dict[str, Any]


def derived(folder: Path, **changes: Callable[[Json], Json]) -> Path:
    """`changes`: a JSON file's stem -> what becomes of its content. All other files are those of the demo."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in Path(DEMO_PATH).iterdir():
        change = changes.pop(path.stem, None) if path.suffix == ".json" else None
        if change is None:
            (folder / path.name).symlink_to(path)
        else:
            (folder / path.name).write_text(json.dumps(change(json.loads(path.read_text()))))
    assert not changes, f"the demo has no {changes}"
    return folder


def with_template(template: str) -> Callable[[Json], Json]:
    return lambda config: config | {"chat_template": template}
