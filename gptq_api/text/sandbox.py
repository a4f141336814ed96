"""The only place that runs Jinja, for templates that come with a model.

A checkpoint's template is somebody else's program. Jinja's immutable sandbox keeps it from attributes, from changing
what it is given, and from everything outside. It does not keep it from taking time and memory, and no list of what to
refuse can: servers render in a process that has limits of both (`text/worker.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, meta, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE_CHARS = 1_000_000


class TemplateRaised(TemplateError):
    """`raise_exception(message)` in a template: the message is meant for whoever sent the messages."""


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes <, >, & and ' for HTML, which a model was never trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateRaised(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


@pass_context
def _as_it_is(context: Context, value: Any) -> Any:
    """Whatever is printed goes through this, and since it asks for the context, Jinja computes no constants while
    compiling: what a template does it does in a request, under that one's limits."""
    return value


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks training text in some templates; it changes nothing here."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a plain class attribute)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[loopcontrols, _Generation],
        optimized=False,
        finalize=_as_it_is,
    )
    environment.filters["tojson"] = _tojson
    del environment.globals["lipsum"]
    # Python's own: the sandbox's is for 100,000 items, which is a limit where there is no other
    environment.globals |= {"range": range, "raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def _undeclared(environment: ImmutableSandboxedEnvironment, tree: nodes.Template) -> frozenset[str]:
    """As jinja2.meta.find_undeclared_variables, which computes constants on its way."""
    generator = meta.TrackingCodeGenerator(environment)
    generator.optimizer = None
    generator.visit(tree)
    return frozenset(name for name in generator.undeclared_identifiers if name[:1] != "_")


class CompiledTemplate:
    """A template, compiled once. Rendering is thread-safe, and as long and large as the template makes it."""

    def __init__(self, source: str) -> None:
        """Raises whatever Jinja and Python raise for what cannot be compiled: TemplateSyntaxError, SyntaxError for
        too many loops in each other, RecursionError; SecurityError for absurd length."""
        if len(source) > MAX_TEMPLATE_CHARS:
            raise SecurityError(f"it has more than {MAX_TEMPLATE_CHARS} characters")
        environment = _environment()
        tree = environment.parse(source)
        self.variables = _undeclared(environment, tree)
        """names that the template reads and does not set itself"""
        self._template = environment.from_string(tree)

    def render(self, variables: Mapping[str, Any]) -> str:
        return self._template.render(dict(variables))
