"""The only place that runs Jinja: a sandbox with a budget, for templates that come with a model.

A checkpoint's template is somebody else's program. Jinja's immutable sandbox keeps it from attributes and from changing
what it is given; the budget here keeps it from taking the server's time and memory. Loops, calls,
concatenations and output are charged as they happen, each charge looks at the clock, and the few operations that make
much out of little in one step (`'a' * 10**10`, padding, replace, join) are refused by size before they are done.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, filters, meta, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS = 1.0
MAX_TEMPLATE_CHARS = 1_000_000
MAX_STEPS = 1_000_000
MAX_CHARS = 4_000_000
"""made by one operation"""
MAX_RANGE = 10_000
MAX_NUMBER = 10_000
"""largest width, count or indentation passed to a method or filter"""
MAX_BITS = 4096
_UNUSED_FILTERS = ("center", "filesizeformat", "format", "pprint", "random", "urlize", "wordwrap", "xmlattr")
"""filters that pad, or that no chat template has a use for"""
_WIDTH = re.compile(r"%[^%a-zA-Z]*(\d{4,}|\*)|:[^}]*\d{4,}")


class TemplateRaised(TemplateError):
    """`raise_exception(message)` in a template: the message is meant for whoever sent the messages."""


class _Budget:
    """What one rendering may still spend."""

    def __init__(self, max_chars: int) -> None:
        self._deadline = time.monotonic() + MAX_SECONDS
        self._steps = MAX_STEPS
        self._chars = max_chars

    def charge(self, *, chars: int = 0) -> None:
        self._steps -= 1
        self._chars -= chars
        if self._steps < 0 or time.monotonic() > self._deadline:
            raise SecurityError(f"the chat template runs for too long (limit: {MAX_SECONDS:g} s)")
        if self._chars < 0:
            raise SecurityError("the chat template produces too much text")


def _budget(context: Context) -> _Budget:
    budget = context.parent["_budget"]  # not context[...]: a template may set its own variable of that name
    assert isinstance(budget, _Budget)
    return budget


@pass_context
def _metered(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    budget = _budget(context)
    for item in items:
        budget.charge()
        yield item


@pass_context
def _output(context: Context, value: Any) -> Any:
    text = value if isinstance(value, str) else str(value)
    _budget(context).charge(chars=len(text))
    return text


@pass_context
def _concatenate(context: Context, parts: Sequence[Any]) -> str:
    texts = [str(part) for part in parts]
    _budget(context).charge(chars=sum(map(len, texts)))
    return "".join(texts)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes <, >, & and ' for HTML, which a model was never trained on."""
    _check_numbers([indent])
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateRaised(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _range(*args: int) -> range:
    numbers = range(*args)
    if len(numbers) > MAX_RANGE:
        raise SecurityError(f"range() of {len(numbers)} items is larger than {MAX_RANGE}")
    return numbers


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks training text in some templates; it changes nothing here."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a plain class attribute)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            finalize=_output,
            optimized=False,  # folding constants would run the template's bombs while compiling
        )
        for name in _UNUSED_FILTERS:
            del self.filters[name]
        self.filters |= {"indent": _indent, "join": _join, "replace": _replace, "tojson": _tojson}
        self.filters |= {"_metered": _metered, "_concatenate": _concatenate}
        del self.globals["lipsum"]
        self.globals |= {"range": _range, "raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _check_product(left, right)
        elif operator == "**":
            if not (isinstance(right, int | float) and abs(right) <= 64) or _bits(left) * 64 > MAX_BITS:
                raise SecurityError("a power in the chat template is too large")
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        result = super().call_binop(context, operator, left, right)
        _budget(context).charge(chars=len(result) if isinstance(result, str | list | tuple) else 0)
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(__context)
        budget.charge()
        subject = getattr(__obj, "__self__", None)
        if isinstance(subject, _BUILTIN) or getattr(__obj, "__name__", "").startswith("format"):
            values = [*args, *kwargs.values()]
            _check_numbers(values)
            if isinstance(subject, str):
                _check_growth(subject, __obj.__name__, values)
        result = super().call(__context, __obj, *args, **kwargs)
        budget.charge(chars=len(result) if isinstance(result, str) else 0)
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped


_BUILTIN = (str, bytes, int, float, list, tuple, dict)


@pass_context
def _replace(context: Context, s: str, old: str, new: str, count: int | None = None) -> str:
    _check_growth(str(s), "replace", [old, new])
    result = filters.do_replace(context.eval_ctx, s, old, new, count)
    _budget(context).charge(chars=len(result))
    return result


@pass_context
def _join(context: Context, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    items = list(value)
    _check_growth(str(d), "join", [items])
    result = str(filters.do_join(context.eval_ctx, items, d, attribute))
    _budget(context).charge(chars=len(result))
    return result


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    columns = len(width) if isinstance(width, str) else width
    if columns * (s.count("\n") + 1) > MAX_CHARS:
        raise SecurityError("indent() in the chat template produces too much text")
    return filters.do_indent(s, width, first, blank)


def _check_growth(subject: str, name: str, args: Sequence[Any]) -> None:
    """Refuses a string method whose result would be far larger than what it is given."""
    if name == "replace" and len(args) >= 2:
        size = subject.count(str(args[0])) * len(str(args[1]))
    elif name == "join" and args and isinstance(args[0], list | tuple):
        size = len(subject) * len(args[0])
    else:
        return
    if size > MAX_CHARS:
        raise SecurityError(f"{name}() in the chat template produces too much text")


def _check_numbers(args: Iterable[Any]) -> None:
    if any(isinstance(arg, int) and not isinstance(arg, bool) and abs(arg) > MAX_NUMBER for arg in args):
        raise SecurityError(f"a number passed to a function in the chat template is larger than {MAX_NUMBER}")


def _check_product(left: Any, right: Any) -> None:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, str | list | tuple) and isinstance(other, int) and len(one) * max(other, 0) > MAX_CHARS:
            raise SecurityError("a repetition in the chat template is too large")
    if _bits(left) + _bits(right) > MAX_BITS:
        raise SecurityError("a product in the chat template is too large")


def _check_format(text: str) -> None:
    if _WIDTH.search(text):
        raise SecurityError("a field width in the chat template is too large")


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


class CompiledTemplate:
    """A template, compiled once. Rendering is thread-safe and bounded in time and size."""

    def __init__(self, source: str) -> None:
        """Raises jinja2.TemplateSyntaxError; RecursionError for absurd nesting; SecurityError for absurd length."""
        if len(source) > MAX_TEMPLATE_CHARS:
            raise SecurityError(f"the chat template has more than {MAX_TEMPLATE_CHARS} characters")
        environment = _Sandbox()
        tree = environment.parse(source)
        self.variables = frozenset(name for name in meta.find_undeclared_variables(tree) if name[:1] != "_")
        """names that the template reads and does not set itself"""
        _rewrite(tree)
        self._template = environment.from_string(tree)

    def render(self, variables: Mapping[str, Any], *, max_chars: int) -> str:
        """`max_chars` bounds the text that is put together on the way, not only the result."""
        return self._template.render(**variables, _budget=_Budget(max_chars))


def _rewrite(node: nodes.Node) -> None:
    """Puts the budget where jinja2 has no hook: into `for`, into `a ~ b` (doubling a string forty times is a bomb), and
    into literal text, which as a constant passes through `finalize` like any other output."""
    for field, value in node.iter_fields():
        if isinstance(value, list):
            setattr(node, field, [_rewritten(item) for item in value])
        else:
            setattr(node, field, _rewritten(value))


def _rewritten(value: Any) -> Any:
    if not isinstance(value, nodes.Node):
        return value
    _rewrite(value)
    if isinstance(value, nodes.For):
        value.iter = nodes.Filter(value.iter, "_metered", [], [], None, None, lineno=value.lineno)
    if isinstance(value, nodes.TemplateData):
        return nodes.Const(value.data, lineno=value.lineno)
    if isinstance(value, nodes.Concat):
        parts = nodes.List(value.nodes, lineno=value.lineno)
        return nodes.Filter(parts, "_concatenate", [], [], None, None, lineno=value.lineno)
    return value
