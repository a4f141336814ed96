"""Forms, however they are cut into pieces."""

from __future__ import annotations

import random

import httpx
import pytest

from gptq_api.api.multipart import MultipartError, MultipartReader, Part, boundary_of


def read(boundary: bytes, pieces: list[bytes]) -> list[tuple[Part, bytes]]:
    reader, found = MultipartReader(boundary), list[tuple[Part, bytes]]()
    for piece in pieces:
        for item in reader.feed(piece):
            if isinstance(item, Part):
                found.append((item, b""))
            else:
                found[-1] = (found[-1][0], found[-1][1] + item)
    reader.finish()
    return found


def cut(data: bytes, rng: random.Random) -> list[bytes]:
    places = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(1, 40)))
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


def test_what_a_client_sends_is_what_is_read() -> None:
    rng = random.Random(1)
    for _ in range(200):
        content = rng.choice([b"", b"\r\n", b"\r\n--", b"--", b"x\r\n--b", rng.randbytes(rng.randrange(300))])
        files = {"file": ('caf\u00e9 ".jsonl', content), "purpose": (None, b"batch")}
        sent = httpx.Request("POST", "http://x", files=files)
        data = sent.read()
        boundary = boundary_of(sent.headers["content-type"])
        for pieces in ([data], [data[i : i + 1] for i in range(len(data))], cut(data, rng)):
            (file, body), (purpose, value) = read(boundary, pieces)
            assert (file.name, body) == ("file", content) and file.filename and "caf" in file.filename
            assert (purpose, value) == (Part("purpose", None), b"batch")


def test_what_stands_before_and_behind_is_nobody_s() -> None:
    head = b'Content-Disposition: form-data; name="a"\r\n\r\n'
    assert read(b"b", [b"preamble\r\n--b\r\n" + head + b"1\r\n--b--\r\nepilogue"]) == [(Part("a", None), b"1")]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "ends before"),
        (b"--b\r\nContent-Disposition: form-data; name=a\r\n\r\n1", "ends before"),
        (b"--bx\r\n", "something else"),
        (b"--b\r\nContent-Type: text/plain\r\n\r\n1\r\n--b--", "Content-Disposition"),
        (b"--b\r\nContent-Disposition: attachment; name=a\r\n\r\n1\r\n--b--", "Content-Disposition"),
        (b"--b\r\nContent-Disposition: form-data\r\n\r\n1\r\n--b--", "Content-Disposition"),
        (b"--b\r\n" + b"x" * 5000, "longer than 4096"),
        (b"--b\r\nContent-Disposition: form-data; name=a\r\n\r\n1\r\n" * 33, "more than 32 parts"),
    ],
)
def test_what_is_no_form(data: bytes, words: str) -> None:
    for pieces in ([data], [data[i : i + 1] for i in range(len(data))]):
        with pytest.raises(MultipartError, match=words):
            read(b"b", pieces)


@pytest.mark.parametrize(
    "kind",
    [
        "",
        "application/json",
        "multipart/form-data",
        "multipart/form-data; boundary=" + "x" * 71,
        "multipart/x; boundary=b",
    ],
)
def test_a_content_type_without_a_boundary(kind: str) -> None:
    with pytest.raises(MultipartError):
        boundary_of(kind)
