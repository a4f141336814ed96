"""Bodies nobody should send: made from the schemas in /openapi.json, valid at first, of which something is wrong then;
and what a server has to make of them."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.attack.client import Reply, Request

Schema = dict[str, Any]
MAX_ERROR_BYTES = 2048
_RAW = {
    "@@deep-list@@": "[" * 30_000 + "]" * 30_000,
    "@@deep-object@@": '{"a":' * 30_000 + "1" + "}" * 30_000,
    "@@deep-unclosed@@": "[" * 100_000,
    "@@overflow@@": "1e999",
    "@@digits@@": "9" * 5_000,
    "@@minus-zero@@": "-0",
    "@@hex@@": "0x10",
    "@@octal@@": "010",
    "@@undefined@@": "undefined",
}
"""what json.dumps would not write, in place of these strings"""


def _deep(levels: int, inner: Any = 1) -> Any:
    for _ in range(levels):
        inner = {"a": [inner]}
    return inner


WRONG: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 0.5, -0.0),
    *(2**31 - 1, 2**31, -(2**31) - 1, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**30, 10**400),
    *(math.nan, math.inf, -math.inf, 1e308, 5e-324),
    *("", " ", "1", "true", "null", "NaN", "auto", "user", "x" * 513, "x" * 70_000, "\0", "\x1b[31m", "\r\n\r\n"),
    *("\ud800", "a\udfffb", "\ud83d", "\ufeff", "\u202e", "\U0010ffff", "é" * 300, "👋" * 300),
    *("<|end|>", "<|assistant|>", "＜|end|＞", "<|e", "{{ 7 * 7 }}", "{% for x in y %}", "'; DROP TABLE", "../../etc"),
    *([], {}, [[]], [{}], [None], [[[]]] * 500, [0] * 2000, ["x"] * 300, [""], [1, "x", None, {}], _deep(30)),
    *(
        {"": ""},
        {"__proto__": {}},
        {"type": "text"},
        {"type": "image_url"},
        {"a": None},
        {str(i): i for i in range(2000)},
    ),
)
_WORDS = ("hello", "count", "story", "é", "one two three", "x", "<|end|>", "你好", "🙂")


@dataclass(slots=True)
class Generator:
    """Endless requests to every route that takes a body. The same seed makes the same ones."""

    document: dict[str, Any]
    rng: random.Random
    routes: list[tuple[str, Schema]] = field(init=False)
    _has_multiplied: bool = field(default=False, init=False)
    """once in a request is enough: lists of lists of lists are more than our own memory holds"""

    def __post_init__(self) -> None:
        self.routes = [
            (path, operation["requestBody"]["content"]["application/json"]["schema"])
            for path, operations in self.document["paths"].items()
            for method, operation in operations.items()
            if method == "post"
        ]
        assert len(self.routes) > 5

    def requests(self, count: int) -> Iterator[Request]:
        for _ in range(count):
            yield self.request()

    def request(self) -> Request:
        rng = self.rng
        path, schema = rng.choice(self.routes)
        body = self.cheap(self.valid(schema))
        self._has_multiplied = False
        for _ in range(rng.choice((0, 1, 1, 1, 1, 2, 3, 8))):
            body = self.changed(body)
        data = self.written(body)
        if rng.random() < 0.1:
            data = self.torn(data)
        headers = [("Content-Type", "application/json")]
        if rng.random() < 0.05:
            headers = [rng.choice(_HEADERS)]
        return Request(path, data, tuple(headers))

    def valid(self, schema: Schema, depth: int = 0) -> Any:
        """A value that the schema allows, mostly."""
        rng = self.rng
        if "$ref" in schema:
            return self.valid(self.document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]], depth)
        if options := schema.get("anyOf") or schema.get("oneOf"):
            return self.valid(rng.choice(options), depth)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return rng.choice(schema["enum"])
        kinds: dict[str, Callable[[Schema, int], Any]] = {
            "object": self._object,
            "array": self._array,
            "string": lambda schema, depth: rng.choice(_WORDS)[: schema.get("maxLength", 99)],
            "integer": lambda schema, depth: int(self._number(schema)),
            "number": lambda schema, depth: self._number(schema),
            "boolean": lambda schema, depth: rng.random() < 0.5,
        }
        make = kinds.get(schema.get("type", ""))
        return None if make is None else make(schema, depth)

    def _object(self, schema: Schema, depth: int) -> Any:
        required, rng = schema.get("required", ()), self.rng
        result = {
            name: self.valid(value, depth + 1)
            for name, value in schema.get("properties", {}).items()
            if name in required or rng.random() < (0.12 if depth == 0 else 0.5)
        }
        for inner in (schema.get("additionalProperties"), *schema.get("patternProperties", {}).values()):
            if isinstance(inner, dict) and rng.random() < 0.5:
                result |= {str(rng.randrange(300)): self.valid(inner, depth + 1) for _ in range(rng.randrange(3))}
        return result

    def _array(self, schema: Schema, depth: int) -> Any:
        least = schema.get("minItems", 0)
        count = max(least, self.rng.choice((0, 1, 1, 2, 3)) if depth < 6 else 0)
        return [self.valid(schema.get("items", {}), depth + 1) for _ in range(count)]

    def _number(self, schema: Schema) -> Any:
        low: Any = schema.get("minimum", schema.get("exclusiveMinimum", 0))
        high: Any = schema.get("maximum", schema.get("exclusiveMaximum", 100))
        return self.rng.choice((low, high, max(low, min(high, self.rng.choice((1, 2, 0.5, 7))))))

    def cheap(self, body: Any) -> Any:
        """Mostly an answer of a few tokens to somebody who says something: it is the reading that is under attack."""
        if isinstance(body, dict) and self.rng.random() < 0.9:
            body |= {name: self.rng.randrange(1, 4) for name in ("max_tokens", "max_output_tokens") if name in body}
            body.setdefault("max_tokens", 2)
            if "messages" in body:
                body["messages"] = [{"role": "user", "content": self.rng.choice(_WORDS)}]
            if body.get("model") is not None:
                body["model"] = "demo"
            for name in ("n", "best_of", "timeout", "min_tokens"):
                body.pop(name, None)
        return body

    def changed(self, value: Any, within: float = 1.0) -> Any:
        """One thing in it is another one, missing, there many times, or has a neighbour that nobody knows. `within`:
        how likely it is one of its parts, where it has any."""
        rng = self.rng
        if isinstance(value, dict) and value and rng.random() < within:
            name = rng.choice(list(value))
            match rng.randrange(10):
                case 0:
                    return {key: inner for key, inner in value.items() if key != name}
                case 1:
                    return value | {rng.choice(("x", "", "a" * 600, "\ud800", "__class__", name + " ")): self.wrong()}
                case 2 | 3 | 4:
                    return value | {name: self.wrong()}
                case _:
                    return value | {name: self.changed(value[name], 0.8)}
        if isinstance(value, list) and value and rng.random() < within:
            place = rng.randrange(len(value))
            match rng.randrange(4):
                case 0 if not self._has_multiplied:
                    self._has_multiplied = True
                    return value * rng.choice((2, 50, 300))
                case 1:
                    return [*value[:place], *value[place + 1 :]]
                case _:
                    return [*value[:place], self.changed(value[place], 0.8), *value[place + 1 :]]
        return self.wrong()

    def wrong(self) -> Any:
        return self.rng.choice(list(_RAW) if self.rng.random() < 0.03 else WRONG)

    def written(self, body: Any) -> bytes:
        """As JSON, in one of the ways in which programs write it."""
        rng = self.rng
        text = json.dumps(body, ensure_ascii=rng.random() < 0.7, indent=rng.choice((None, None, 2)))
        for mark, raw in _RAW.items():
            text = text.replace(f'"{mark}"', raw)
        return text.encode("utf-8", "surrogatepass")

    def torn(self, data: bytes) -> bytes:
        """Bytes that are not what they were."""
        rng = self.rng
        place = rng.randrange(len(data) + 1)
        torn: tuple[Callable[[], bytes], ...] = (
            lambda: data[:place],
            lambda: data[:place] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 5))) + data[place:],
            lambda: (
                data[:place]
                + rng.choice((b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\0"))
                + data[place:]
            ),
            lambda: b"\xef\xbb\xbf" + data,
            lambda: data.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-32", "utf-7"))),
            lambda: data[:1] + b'"model":"demo","messages":[],"prompt":null,"messages":{},' + data[1:],
            lambda: data.replace(b'"', b"'"),
            lambda: data.replace(b":", b"", 1),
            lambda: data + rng.choice((b",", b"}", data, b"\0", b" " * 10_000)),
            lambda: b"// x\n" + data,
            lambda: rng.choice((b"", b" ", b"null", b"[]", b"{}", b'"x"', b"1", b"[{}]", b"\x1f\x8b\x08", b"a=b&c=d")),
        )
        return rng.choice(torn)()


_HEADERS = (
    ("Content-Type", "text/plain"),
    ("Content-Type", "application/json; charset=utf-16"),
    ("Content-Type", "application/vnd.x+json"),
    ("Content-Type", "multipart/form-data; boundary=x"),
    ("Content-Type", ""),
    ("Content-Encoding", "gzip"),
    ("Accept", "text/html"),
    ("X-Request-Id", "x" * 5000),
    ("X-Priority", "9" * 40),
)


def faults(replies: list[Reply]) -> list[str]:
    """What is wrong with these answers, a line each; empty where all is well."""
    found = []
    for reply in replies:
        why = fault(reply)
        if why is not None:
            body = reply.request.body
            shown = body[:300] + b" ... " + body[-100:] if len(body) > 400 else body
            found.append(f"{why}: {reply.request.path} {reply.request.headers} {shown!r} -> {reply.body[:300]!r}")
    return found


def fault(reply: Reply) -> str | None:
    if reply.status == 0:
        return f"unanswered ({reply.why})"
    if reply.status >= 500 and not (reply.status == 504 and b'"timeout"' in reply.request.body):  # which was asked for
        return f"status {reply.status}"
    if reply.status == 200:
        if b'"server_error"' in reply.body or b'"api_error"' in reply.body:
            return "an error event of ours"
        return None
    if len(reply.body) > MAX_ERROR_BYTES:
        return f"{reply.status} with {len(reply.body)} bytes"
    try:
        answer = json.loads(reply.body)
    except ValueError:
        return f"{reply.status} without JSON"
    ours = {"message", "type", "param", "code"}
    if reply.request.path.startswith("/v1/messages"):
        if answer.get("type") != "error" or not {"type", "message"} <= answer["error"].keys():
            return f"{reply.status} not in Anthropic's shape"
    elif answer.keys() != {"error"} or not ours <= answer["error"].keys():
        return f"{reply.status} not in OpenAI's shape"
    return None


def statuses(replies: list[Reply]) -> dict[int, int]:
    return dict(sorted(Counter(reply.status for reply in replies).items()))
