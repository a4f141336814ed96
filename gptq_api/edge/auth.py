"""API keys: any of them, as a bearer token or in x-api-key, compared in constant time; and who a caller is."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from starlette.datastructures import Headers

from gptq_api.edge.hosts import is_loopback
from gptq_api.edge.keys import HIGHEST_LEVEL, Key, KeyFile, Role, digest_of, plain_keys
from gptq_api.edge.limits import Account
from gptq_api.types import BACKGROUND

IPV6_PREFIX = 64
"""bits of an IPv6 address that are one network's: whoever has one address there has all of them"""


@dataclass(slots=True, frozen=True, eq=False)
class Caller:
    """Whose request it is, and what they may. Owner, salt and identity may be stored: none tells the key or the
    address."""

    identity: str = ""
    """of the key, today and tomorrow: whose things are whose. The name of one that has a name; "" without keys, where
    all is everybody's"""
    owner: bytes = b""
    """16 bytes, of the key or without keys of the address: who shares the server with whom"""
    salt: bytes = b""
    """8 bytes derived from the key: who shares cached prefixes; empty where no key is configured"""
    role: Role = "admin"
    level: int = 0
    """between callers the lowest number is served first"""
    account: Account | None = None
    """of a key that has a name"""

    def may(self, role: Role) -> bool:
        """Whether it may do what the role is for."""
        return self.role in (role, "admin")

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Of an answer to it: what is left of its limits."""
        return [] if self.account is None else self.account.headers(time.monotonic())


NOBODY = Caller()


class Authenticator:
    """Knows the SHA-256 of the accepted keys, never the keys. Those of a file may change."""

    def __init__(self, keys: Iterable[str] = (), file: KeyFile | None = None) -> None:
        """Raises KeyFileError."""
        self._fixed, self._file = plain_keys(keys), file
        self._secret = os.urandom(16)
        self._callers: dict[bytes, Caller] = {}  # by digest
        self.accounts: dict[str, Account] = {}
        """by the names of keys"""
        self._use([] if file is None else file.read())

    @property
    def has_keys(self) -> bool:
        return bool(self._callers)

    def may_differ(self, host: str) -> bool:
        """Whether a server that listens on `host` may have callers that are not one and the same."""
        if not self._callers:
            return not is_loopback(host)
        return sum(caller.may("user") for caller in self._callers.values()) > 1

    def check(self, headers: Headers, address: str) -> Caller | None:
        """None where the key is missing or wrong. All keys are compared, whatever the first comparison said."""
        if not self._callers:
            return Caller(owner=self._owner(_network(address)))
        presented = {digest_of(key) for key in _presented(headers)}
        found = {digest for digest in presented for known in self._callers if hmac.compare_digest(digest, known)}
        return self._callers[found.pop()] if len(found) == 1 else None

    def in_background(self, identity: str) -> Caller | None:
        """Who works for a caller while that is away, behind everybody; None where nobody has the key any more."""
        caller = NOBODY if not self._callers else self._identities.get(identity)
        if caller is None or caller.identity != identity:
            return None
        owner = self._owner(b"background" + identity.encode())
        return replace(caller, owner=owner, level=BACKGROUND + HIGHEST_LEVEL + caller.level)

    async def watch(self, on_change: Callable[[], None]) -> None:
        """Follows the file, where there is one, until it is cancelled. Requests that run go on as they are."""

        def use(keys: list[Key]) -> None:
            self._use(keys)
            on_change()

        if self._file is not None:
            await self._file.watch(use)

    def _use(self, keys: list[Key]) -> None:
        """Beside those that stay. What a key has used is kept with its name."""
        now = time.monotonic()
        accounts = dict[str, Account]()
        for key in keys:
            if key.name is None:
                continue
            if (account := self.accounts.get(key.name)) is None:
                account = Account(key, now)
            else:
                account.change(key, now)
            accounts[key.name] = account
        callers = {key.digest: self._caller(key, accounts) for key in (*self._fixed, *keys)}
        self._callers, self.accounts = callers, accounts
        self._identities = {caller.identity: caller for caller in callers.values()}

    def _caller(self, key: Key, accounts: dict[str, Account]) -> Caller:
        whose = key.digest if key.name is None else key.name.encode()
        account = None if key.name is None else accounts[key.name]
        salt = hashlib.sha256(key.digest).digest()[:8]
        identity = f"key {hashlib.sha256(b'identity' + key.digest).hexdigest()}" if key.name is None else key.name
        return Caller(identity, self._owner(whose), salt, key.role, key.level, account)

    def _owner(self, what: bytes) -> bytes:
        return hashlib.blake2b(what, digest_size=16, key=self._secret).digest()


def _network(address: str) -> bytes:
    """Whoever has the address may have all of these: this machine, an IPv6 network, one IPv4 address."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return b"unknown"
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is None:
            return b"loopback" if ip.is_loopback else ip.packed[: IPV6_PREFIX // 8]
        ip = ip.ipv4_mapped
    return b"loopback" if ip.is_loopback else ip.packed


def _presented(headers: Headers) -> list[str]:
    """At most one key of each header. Claude Code sends both, the second of them meant for somebody else; two that are
    known here are nobody's, since there is no guessing which one is meant."""
    bearer, plain = headers.getlist("authorization"), headers.getlist("x-api-key")
    if len(bearer) > 1 or len(plain) > 1:
        return []
    keys = [
        token.strip() for scheme, _, token in (line.partition(" ") for line in bearer) if scheme.lower() == "bearer"
    ]
    return keys + plain


def why_refused(headers: Headers) -> str:
    """What is wrong with the key of a request that `check` refused, a sentence without its period."""
    bearer, plain = headers.getlist("authorization"), headers.getlist("x-api-key")
    if len(bearer) + len(plain) > 1:
        return "More than one API key was sent"
    if not any((*bearer, *plain)):
        return "No API key was sent"
    if bearer and not bearer[0].lower().startswith("bearer "):
        return "The Authorization header holds no bearer token"
    return "Incorrect API key provided"
