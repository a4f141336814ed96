"""Writes docs/fields.md from the bodies of the two generation routes; `--check` says whether it is up to date."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptq_api.api.requests.chat import ChatCompletionRequest
from gptq_api.api.requests.completions import CompletionRequest
from gptq_api.api.requests.fields import SamplingFields
from gptq_api.api.requests.own_fields import OwnFields
from gptq_api.api.requests.refused import REFUSED

PAGE = Path(__file__).parents[1] / "docs" / "fields.md"
MODELS: dict[str, type[SamplingFields]] = {"chat": ChatCompletionRequest, "completions": CompletionRequest}
"""by the word for the route in the table"""
HEAD = """# Request fields

Written by `tools/fields_table.py`; `tests/system/test_fields.py` sends each field to a server and sees what it does, by
the cases of `tests/support/fields.py`.

`POST /v1/chat/completions` and `POST /v1/completions` take the fields of the first table. **Honoured**: the answer, the
log or the order of the work depends on it. **Accepted**: taken without a word, and nothing depends on it. Null is the
same as leaving a field out. Fields of the second table are refused by name with 400, unless their value means "off".
Any other field is named in the response header `x-unsupported-params`, and with `--strict-params` refused.

`POST /v1/responses` and `POST /v1/messages` have the fields of OpenAI's and Anthropic's APIs, which become those of a
chat, and besides them these, which mean what they mean here:
"""


def is_accepted(model: type[SamplingFields], name: str) -> bool:
    """Whether nothing depends on the field; its docstring begins so."""
    return (model.model_fields[name].description or "").startswith("Accepted")


def refused(model: type[SamplingFields]) -> list[str]:
    return [name for name in REFUSED if name not in model.model_fields]


def values(schema: dict[str, Any]) -> str:
    """What may be sent, in a few words."""
    if "anyOf" in schema:
        kinds = [values(one) for one in schema["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema or "const" in schema:
        return ", ".join(f'"{value}"' for value in schema.get("enum", [schema.get("const")]))
    kind = str(schema.get("type", "object"))
    if kind in ("integer", "number"):
        return f"{kind} from {_number(schema['minimum'])} to {_number(schema['maximum'])}"
    limits = {
        "string": ("maxLength", "characters"),
        "array": ("maxItems", "items"),
        "object": ("maxProperties", "names"),
    }
    word, unit = limits.get(kind, ("", ""))
    return f"{kind} of up to {_number(schema[word])} {unit}" if word in schema else kind


def _number(value: float) -> str:
    powers = {2**31 - 1: "2^31 - 1", 2**63 - 1: "2^63 - 1", -(2**63): "-2^63", 8 * 2**20: "2^23", 2**18: "2^18"}
    return powers.get(int(value), f"{value:g}") if abs(value) > 1 else f"{value:g}"


def _rows() -> Iterator[str]:
    schemas = {route: model.model_json_schema()["properties"] for route, model in MODELS.items()}
    for name in dict.fromkeys(name for model in MODELS.values() for name in model.model_fields):
        routes = [route for route in MODELS if name in MODELS[route].model_fields]
        cells = {route: (values(_of(schemas[route], name)), _meaning(MODELS[route], name)) for route in routes}
        if len(set(cells.values())) == 1:
            where = "both" if len(routes) == len(MODELS) else routes[0]
            yield _row(name, where, *cells[routes[0]])
        else:
            for route in routes:
                yield _row(name, route, *cells[route])


def _of(schemas: dict[str, Any], name: str) -> dict[str, Any]:
    schema: dict[str, Any] = schemas.get(name) or schemas["schema"]
    return schema


def _meaning(model: type[SamplingFields], name: str) -> str:
    said = " ".join((model.model_fields[name].description or "").split())
    if is_accepted(model, name):
        return said
    return f"Honoured. {said}" if said else "Honoured."


def _row(name: str, where: str, allowed: str, meaning: str) -> str:
    return f"| `{name}` | {where} | {allowed} | {meaning.replace('|', chr(92) + '|')} |"


def page() -> str:
    own = ", ".join(f"`{name}`" for name in OwnFields.model_fields)
    lines = [HEAD + own + ".", "", "| field | on | values | |", "|---|---|---|---|", *_rows(), ""]
    lines += ["| refused on | fields |", "|---|---|"]
    for route, model in MODELS.items():
        lines.append(f"| {route} | {', '.join(f'`{name}`' for name in refused(model))} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    if "--check" in sys.argv[1:]:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
