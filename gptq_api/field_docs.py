"""Descriptions of a model's fields from the docstrings beneath them.

As pydantic's `use_attribute_docstrings`, which before Python 3.13 tokenizes the source for every class: a tenth of a
second of each command's start. Here a module is parsed once. Bodies of requests are left to pydantic: it would build
their schemas with the first request, since FastAPI takes `defer_build` over, and warn of that.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Iterator

from pydantic import BaseModel


def describe(model: type[BaseModel]) -> None:
    """Give each field that has no description its docstring. For `__pydantic_init_subclass__` of a class with
    `defer_build`: a schema that was built has the descriptions of then."""
    for name, text in _docstrings(model.__module__).get(model.__qualname__, {}).items():
        field = model.__pydantic_fields__.get(name)
        if field is not None and field.description is None:
            field.description = text


@functools.cache
def _docstrings(module: str) -> dict[str, dict[str, str]]:
    """By class and attribute; empty where the source is not there."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except OSError:
        return {}
    return {node.name: dict(_of(node)) for node in tree.body if isinstance(node, ast.ClassDef)}


def _of(class_: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, below in zip(class_.body, class_.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, inspect.cleandoc(text)
