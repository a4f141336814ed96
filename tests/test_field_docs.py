"""Fields are described as pydantic would describe them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

MODELS = '''
from typing import Any, ClassVar

from pydantic import BaseModel, Field

from gptq_api.field_docs import describe


class First(BaseModel):
    """Of the class."""

    one: int = 0
    """In one line."""
    two: str = "x"
    """In several,

        one of them indented.
    """
    three: float
    four: bool = Field(False, description="Said before.")
    """Not said."""
    five: ClassVar[int] = 5
    """No field."""
    _six: int = 6
    """Nor this."""
    seven: int = 7; """On the same line."""

    def method(self) -> None:
        """Of a method."""

    eight: Any = None
    "Behind a method."


class Second(First):
    """Inherits."""

    nine: int = 9
    """Its own."""
    one: int = 1


class Second(First):
    """Of the same name."""

    ten: int = 10
    """The last one."""
'''
BY_US = """
    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs):
        describe(cls)
        cls.model_rebuild()

    model_config = {"defer_build": True}
"""
BY_PYDANTIC = """
    model_config = {"use_attribute_docstrings": True}
"""


def described(folder: Path, name: str, config: str) -> dict[str, object]:
    base = MODELS.replace("class First(BaseModel):", f"class Base(BaseModel):\n{config}\n\nclass First(Base):")
    (folder / f"{name}.py").write_text(base)
    module = importlib.import_module(name)
    return {
        "of fields": [{n: f.description for n, f in one.model_fields.items()} for one in (module.First, module.Second)],
        "of schemas": module.Second.model_json_schema()["properties"],
    }


def test_as_pydantic_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    try:
        ours, theirs = described(tmp_path, "by_us", BY_US), described(tmp_path, "by_pydantic", BY_PYDANTIC)
    finally:
        for name in ("by_us", "by_pydantic"):
            sys.modules.pop(name, None)
    assert ours == theirs and "In one line." in str(ours) and "The last one." in str(ours)


def test_without_source_nothing_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "bare.py").write_text(MODELS + "\nFirst.model_fields['one'].description = None\n")
    module = importlib.import_module("bare")
    (tmp_path / "bare.py").unlink()
    module.describe(module.First)
    assert module.First.model_fields["one"].description is None
    sys.modules.pop("bare")
