"""API keys in a file: which are known, whose they are, and what they may do.

Either TOML, a table for each key:

    [[key]]
    name = "alice"                  # in logs and metrics
    key = "sk-..."                  # or sha256 = "hex of the key's SHA-256"
    role = "user"                   # user: the API; metrics: /metrics; admin: both. Default: user
    requests_per_minute = 60        # limits; none by default
    tokens_per_minute = 20000
    max_concurrent = 4
    priority = 0                    # keys with a lower number are served first

or a key a line, as secrets of containers are: these have no names and no limits and may do all. Empty lines and those
that begin with # are skipped.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import hashlib
import re
import signal
import stat
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import structlog

from gptq_api import exits
from gptq_api.errors import UserError

log = structlog.get_logger()

Role = Literal["user", "metrics", "admin"]
MOST_KEYS = 1000
"""Every request is compared with each of them, and each name is a series of the metrics"""
MOST_BYTES = 2**20
POLL_S = 1.0
_TABLE = re.compile(r"^\s*\[", re.MULTILINE)
_Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._@-]{1,64}$")]
_Limit = Annotated[int, msgspec.Meta(ge=1, le=10**12)]
HIGHEST_LEVEL = 1000
_Level = Annotated[int, msgspec.Meta(ge=-HIGHEST_LEVEL, le=HIGHEST_LEVEL)]


class KeyFileError(UserError):
    """The file cannot be used; the text names the file, the key by its number and name, and the remedy."""

    exit_status = exits.WRONG_USE


@dataclass(slots=True, frozen=True)
class Key:
    digest: bytes
    """SHA-256 of the key"""
    name: str | None = None
    role: Role = "admin"
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    level: int = 0


_MEANT = {
    "name": "is made of 1 to 64 letters, digits and signs of ._@-",
    "key": "is a text",
    "sha256": "is made of 64 hexadecimal digits",
    "role": "is one of user, metrics and admin",
    "requests_per_minute": "is a positive integer",
    "tokens_per_minute": "is a positive integer",
    "max_concurrent": "is a positive integer",
    "priority": "is an integer from -1000 to 1000",
}


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """A [[key]] table."""

    name: _Name
    key: str | None = None
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Fa-f]{64}$")] | None = None
    role: Role = "user"
    requests_per_minute: _Limit | None = None
    tokens_per_minute: _Limit | None = None
    max_concurrent: _Limit | None = None
    priority: _Level = 0


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def plain_keys(keys: Iterable[str]) -> list[Key]:
    """Keys without names, such as those of --api-key."""
    return [Key(digest_of(key)) for key in keys]


def travels(key: str) -> bool:
    """Whether an HTTP header carries it as it is."""
    return bool(key) and key.isascii() and key.isprintable() and not {" ", ","} & set(key)


class KeyFile:
    """A file that may change while the server runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None  # as the file was when it was read last

    def read(self) -> list[Key]:
        """Raises KeyFileError."""
        self._seen = self._stamp()
        try:
            with self.path.open("rb") as file:
                data = file.read(MOST_BYTES + 1)
        except OSError as error:
            raise KeyFileError(f"key file {self.path} cannot be read: {error.strerror}") from None
        try:
            keys = _keys(data, is_toml=self.path.suffix == ".toml")
        except ValueError as error:
            raise KeyFileError(f"key file {self.path}: {error}") from None
        return keys

    def is_open_to_all(self) -> bool:
        """Whether every user of this machine may read it."""
        try:
            return bool(self.path.stat().st_mode & stat.S_IROTH)
        except OSError:
            return False

    async def watch(self, use: Callable[[list[Key]], None]) -> None:
        """Reads the file again whenever it has changed, and at SIGHUP, and hands its keys to `use`; a file that is
        wrong is one line of the log, and changes nothing. Returns when it is cancelled."""
        asked = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, asked.set)
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asked.wait(), POLL_S)
            # in a thread: a file of a network may take its time
            if not asked.is_set() and await asyncio.to_thread(self._stamp) == self._seen:
                continue
            asked.clear()
            try:
                keys = await asyncio.to_thread(self.read)
            except KeyFileError as error:
                log.error(f"{error}; the keys stay as they were")
                continue
            use(keys)
            log.info(f"{len(keys)} keys read from {self.path}")

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


def _keys(data: bytes, *, is_toml: bool) -> list[Key]:
    """Raises ValueError, a sentence without its period that shows no key."""
    if len(data) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    keys = _of_tables(text) if is_toml or _TABLE.search(text) else _of_lines(text)
    if not keys:
        raise ValueError("it holds no key; give one a line, or TOML with [[key]] tables")
    if len(keys) > MOST_KEYS:
        raise ValueError(f"it holds {len(keys)} keys; the most are {MOST_KEYS}")
    for what, values in (("key", [key.digest for key in keys]), ("name", [key.name for key in keys if key.name])):
        known: set[object] = set()
        for number, value in enumerate(values, 1):
            if value in known:
                shown = f" ({value})" if what == "name" else ""
                raise ValueError(f"the {what} of key {number}{shown} is there twice")
            known.add(value)
    return keys


def _of_lines(text: str) -> list[Key]:
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not travels(key):
            raise ValueError(
                f"line {number} is not a key: one a line, of ASCII letters, digits and signs, without spaces and "
                "commas; or TOML with [[key]] tables"
            )
        keys.append(Key(digest_of(key)))
    return keys


def _of_tables(text: str) -> list[Key]:
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"it is not valid TOML: {error}") from None
    tables = content.get("key", [])
    if content.keys() - {"key"} or not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ValueError("there is something beside [[key]] tables")
    return [_of_table(number, table) for number, table in enumerate(tables, 1)]


def _of_table(number: int, table: dict[str, Any]) -> Key:
    name = table.get("name")
    shown = f"key {number} ({name})" if isinstance(name, str) and name.isprintable() else f"key {number}"
    try:
        entry = msgspec.convert(table, _Entry)
    except msgspec.ValidationError as error:
        raise ValueError(f"{shown}: {_what_is_wrong(str(error))}") from None
    if (entry.key is None) == (entry.sha256 is None):
        raise ValueError(f"{shown} needs either key or sha256")
    if entry.key is not None and not travels(entry.key):
        raise ValueError(f"{shown}: a key is made of ASCII letters, digits and signs, without spaces and commas")
    return Key(
        digest_of(entry.key) if entry.key is not None else bytes.fromhex(entry.sha256 or ""),
        entry.name,
        entry.role,
        entry.requests_per_minute,
        entry.tokens_per_minute,
        entry.max_concurrent,
        entry.priority,
    )


def _what_is_wrong(error: str) -> str:
    """In our words, which show no value: it may be a key."""
    if "missing required field" in error:
        return "name is missing"
    field = error.split("`")[1] if "unknown field" in error else error.rpartition("`$.")[2].rstrip("`")
    if field in _MEANT:
        return f"{field} {_MEANT[field]}"
    close = difflib.get_close_matches(field, _MEANT, n=1)
    return f"{field} is not a setting of a key" + (f"; did you mean {close[0]}?" if close else "")
