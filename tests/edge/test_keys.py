"""Files with API keys: what they may hold, what is wrong with others, and that no sentence shows a key."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from gptq_api.edge.keys import MOST_KEYS, Key, KeyFile, KeyFileError, digest_of

SECRET = "sk-very-secret"


def keys(tmp_path: Path, text: str | bytes, name: str = "keys") -> list[Key]:
    file = tmp_path / name
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return KeyFile(file).read()


def table(*lines: str) -> str:
    return "\n".join(["[[key]]", *lines, ""])


def test_a_key_a_line(tmp_path: Path) -> None:
    for text in ("one\ntwo\n", "\n# ours\n  one  \r\n\r\ntwo", "\ufeffone\ntwo\n"):
        assert keys(tmp_path, text) == [Key(digest_of("one")), Key(digest_of("two"))]
    assert keys(tmp_path, "b64+/key==")[0].digest == hashlib.sha256(b"b64+/key==").digest()


def test_tables(tmp_path: Path) -> None:
    text = "# keys of the lab\n" + table('name = "alice"', f'key = "{SECRET}"')
    text += table(
        'name = "bob@lab"',
        f'sha256 = "{hashlib.sha256(b"x").hexdigest().upper()}"',
        'role = "admin"',
        "requests_per_minute = 60",
        "tokens_per_minute = 20_000",
        "max_concurrent = 4",
        "priority = -2",
    )
    assert keys(tmp_path, text) == [
        Key(digest_of(SECRET), "alice", "user"),
        Key(digest_of("x"), "bob@lab", "admin", 60, 20_000, 4, -2),
    ]


WRONG = {
    "": "it holds no key",
    "# none yet\n\n": "it holds no key",
    "one key\n": "line 1 is not a key",
    "one\nk\u00e9y\n": "line 2 is not a key",
    f'name = "{SECRET}"\n': "line 1 is not a key",
    "one\ntwo\none\n": "the key of key 3 is there twice",
    "[key]\nname='a'\n": "something beside [[key]] tables",
    "[[keys]]\nname='a'\n": "something beside [[key]] tables",
    "[[key]\n": "not valid TOML",
    table(f'key = "{SECRET}"'): "key 1: name is missing",
    table('name = "a"'): "key 1 (a) needs either key or sha256",
    table('name = "a"', f'key = "{SECRET}"', f'sha256 = "{"0" * 64}"'): "key 1 (a) needs either key or sha256",
    table('name = "a"', 'key = ""'): "key 1 (a): a key is made of",
    table('name = "a"', f'key = "{SECRET} "'): "key 1 (a): a key is made of",
    table('name = "a"', 'sha256 = "123"'): "key 1 (a): sha256 is made of 64 hexadecimal digits",
    table('name = "a b"', f'key = "{SECRET}"'): "key 1 (a b): name is made of 1 to 64 letters",
    table("name = 7", f'key = "{SECRET}"'): "key 1: name is made of 1 to 64 letters",
    table('name = "a"', 'role = "root"'): "role is one of user, metrics and admin",
    table('name = "a"', "requests_per_minute = 0"): "requests_per_minute is a positive integer",
    table('name = "a"', "tokens_per_minute = 1.5"): "tokens_per_minute is a positive integer",
    table('name = "a"', 'max_concurrent = "4"'): "max_concurrent is a positive integer",
    table('name = "a"', "priority = 1001"): "priority is an integer from -1000 to 1000",
    table('name = "a"', "token_per_minute = 5"): "token_per_minute is not a setting of a key; did you mean tokens_per",
    table('name = "a"', 'key = "1"') + table('name = "a"', 'key = "2"'): "the name of key 2 (a) is there twice",
    table('name = "a"', 'key = "1"') + table('name = "b"', 'key = "1"'): "the key of key 2 is there twice",
    "\n".join(f"key{i}" for i in range(MOST_KEYS + 1)): f"the most are {MOST_KEYS}",
    "x" * (2**20 + 1): "larger than",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:40])
def test_what_is_wrong_is_one_sentence_that_shows_no_key(text: str, tmp_path: Path) -> None:
    with pytest.raises(KeyFileError) as caught:
        keys(tmp_path, text)
    sentence = str(caught.value)
    assert WRONG[text] in sentence and f"key file {tmp_path / 'keys'}" in sentence
    assert SECRET not in sentence and "\n" not in sentence and len(sentence) < 400


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="is not valid TOML"):
        keys(tmp_path, "one\n", "keys.toml")
    with pytest.raises(KeyFileError, match="byte 0 is not UTF-8"):
        keys(tmp_path, b"\xff\xfe")
    with pytest.raises(KeyFileError, match="nowhere cannot be read: No such file"):
        KeyFile(tmp_path / "nowhere").read()
    with pytest.raises(KeyFileError, match="cannot be read: Is a directory"):
        KeyFile(tmp_path).read()


def test_who_may_read_it(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n")
    for mode, is_open in ((0o600, False), (0o640, False), (0o644, True), (0o604, True)):
        os.chmod(file, mode)
        assert KeyFile(file).is_open_to_all() is is_open
