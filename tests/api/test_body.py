"""How much JSON a body is, counted while it arrives."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from gptq_api.api.body import MAX_NODES, MAX_VALUES, Counted
from gptq_api.api.errors import ApiError

TEXTS = ["", "a,b:[{", '"', '\\"', "\\", "\\\\", 'x\\",[', "é\n\U0001f600", '"{[,:']


def tree(random: random.Random, depth: int) -> Any:
    kind = random.randrange(5 if depth else 2)
    if kind == 0:
        return random.choice(TEXTS)
    if kind == 1:
        return random.choice([1, -1.5, None, True])
    if kind < 4:
        return [tree(random, depth - 1) for _ in range(random.randrange(5))]
    return {random.choice(TEXTS) + str(i): tree(random, depth - 1) for i in range(random.randrange(5))}


def nodes(value: Any) -> int:
    """Keys, arrays and objects."""
    if isinstance(value, dict):
        return 1 + len(value) + sum(map(nodes, value.values()))
    return 1 + sum(map(nodes, value)) if isinstance(value, list) else 0


def commas(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    inner = list(value.values()) if isinstance(value, dict) else value
    return max(0, len(inner) - 1) + sum(map(commas, inner))


@pytest.mark.parametrize("seed", range(200))
def test_it_is_exact_wherever_the_text_is_cut(seed: int) -> None:
    source = random.Random(seed)
    value = [tree(source, 4) for _ in range(4)]
    data = json.dumps(value, ensure_ascii=bool(seed % 2)).encode()
    counted, start = Counted(), 0
    while start < len(data):
        end = start + source.choice([1, 2, 3, 50])
        counted.add(data[start:end])
        start = end
    assert (counted.num_nodes, counted.num_values) == (nodes(value), commas(value))


def test_the_limits() -> None:
    for text, what in (
        ("[" * (MAX_NODES + 1), "keys, arrays and objects"),
        ("{" + '"a":1,' * MAX_NODES, "keys, arrays and objects"),
        ("[" + "1," * (MAX_VALUES + 1), "values"),
    ):
        counted = Counted()
        counted.add(text.encode())
        with pytest.raises(ApiError, match="400") as error:
            counted.check()
        assert what in error.value.error["message"]
    counted = Counted()
    counted.add(json.dumps([1] * MAX_VALUES + ["[{,:" * 10**6]).encode())
    counted.check()
