"""Lines of requests: where each of them stands, and what is wrong with which."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptq_api.batch import lines as module
from gptq_api.batch.lines import body_of, read_input
from tests.support.batches import CHAT, counting, jsonl, request


def written(tmp_path: Path, data: bytes) -> Path:
    file = tmp_path / "in.jsonl"
    file.write_bytes(data)
    return file


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n \n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_line_is_found_again_where_it_stands(end: bytes, mark: bytes, tmp_path: Path) -> None:
    asked = counting(5)
    asked[2]["body"]["messages"][0]["content"] = 'caf\u00e9 \u2028 \U0001f600 \\n " {}'
    data = mark + end.join(json.dumps(line, ensure_ascii=False).encode() for line in asked)
    found = read_input(written(tmp_path, data), CHAT, 2**20)
    assert not found.errors and [line.custom_id for line in found.lines] == [line["custom_id"] for line in asked]
    for line, wanted in zip(found.lines, asked, strict=True):
        assert json.loads(body_of(data[line.offset : line.offset + line.size])) == wanted["body"]


def test_a_line_that_is_too_long_is_told_and_the_next_is_found(tmp_path: Path) -> None:
    long = json.dumps(request("long", {"prompt": "x" * 5000})).encode()
    data = long + b"\n" + jsonl(counting(1)) + long
    found = read_input(written(tmp_path, data), None, 1000)
    assert [(error.line, error.code) for error in found.errors] == [(1, "line_too_long"), (3, "line_too_long")]
    (line,) = found.lines
    assert line.number == 2 and data[line.offset : line.offset + line.size] == jsonl(counting(1))


def test_the_most_lines_and_the_most_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = jsonl(counting(5))
    assert not read_input(written(tmp_path, data), None, 2**20, max_lines=5).errors
    (error,) = read_input(written(tmp_path, data), None, 2**20, max_lines=4).errors
    assert (error.code, error.line) == ("too_many_tasks", 5) and "at most 4 requests" in error.message
    found = read_input(written(tmp_path, b"{\n" * 1000), None, 2**20)
    assert len(found.errors) == module.MAX_TOLD


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (b"", "empty_file", "holds no request"),
        (b"\xff", "invalid_json_line", "not parseable"),
        (b"[" * 100_000, "invalid_json_line", "not parseable"),
        (b'"text"', "invalid_json_line", "not a JSON object"),
        (json.dumps({**request("a", {}), "custom_id": 5}).encode(), "invalid_value", "string of 1 to 512"),
        (json.dumps({**request("a", {}), "custom_id": "x" * 513}).encode(), "invalid_value", "string of 1 to 512"),
        (json.dumps({**request("a", {}), "url": ["x"]}).encode(), "invalid_url", "must be one of"),
        (json.dumps({**request("a", {}), "body": []}).encode(), "invalid_value", "'body' must be an object"),
    ],
)
def test_what_is_wrong_with_a_line(line: bytes, code: str, words: str, tmp_path: Path) -> None:
    found = read_input(written(tmp_path, line), None, 2**20)
    (error,) = found.errors
    assert error.code == code and words in error.message and not found.lines
    assert code == "empty_file" or str(error).startswith("line 1: ")
