"""Parts of README.md and docs that scripts write from their results, between two comments; tests hold them against the
files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README, MEASUREMENTS = ROOT / "README.md", ROOT / "docs" / "measurements.md"


@dataclass(frozen=True)
class Part:
    """What stands in `page` between the comments that name it and the script that writes it."""

    page: Path
    name: str
    script: str

    def holds(self, text: str) -> bool:
        """Whether the page says this."""
        return self._page() == self._with(text)

    def write(self, text: str) -> None:
        self.page.write_text(self._with(text), encoding="utf-8")

    def _page(self) -> str:
        return self.page.read_text(encoding="utf-8")

    def _with(self, text: str) -> str:
        begin, end = f"<!-- {self.name}: written by {self.script} --page -->\n", f"<!-- end of {self.name} -->\n"
        head, rest = self._page().split(begin)
        return head + begin + text + rest[rest.index(end) :]
