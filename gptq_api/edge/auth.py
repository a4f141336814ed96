"""API keys: any of them, as a bearer token or in x-api-key, compared in constant time; and who a caller is."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.datastructures import Headers

from gptq_api.edge.hosts import is_loopback

IPV6_PREFIX = 64
"""bits of an IPv6 address that are one network's: whoever has one address there has all of them"""


@dataclass(slots=True, frozen=True, eq=False)
class Caller:
    """Whose request it is. Both may be stored: neither tells the key or the address."""

    owner: bytes = b""
    """16 bytes, of the key or without keys of the address: who shares the server with whom"""
    salt: bytes = b""
    """8 bytes derived from the key: who shares cached prefixes; empty where no key is configured"""


NOBODY = Caller()


class Authenticator:
    """Knows the SHA-256 of the accepted keys, never the keys."""

    def __init__(self, keys: Iterable[str]) -> None:
        digests = {hashlib.sha256(key.encode()).digest() for key in keys}
        self._secret = os.urandom(16)
        self._callers = {
            digest: Caller(self._owner(digest), hashlib.sha256(digest).digest()[:8]) for digest in sorted(digests)
        }

    def may_differ(self, host: str) -> bool:
        """Whether a server that listens on `host` may have callers that are not one and the same."""
        return len(self._callers) > 1 if self._callers else not is_loopback(host)

    def check(self, headers: Headers, address: str) -> Caller | None:
        """None where the key is missing or wrong. All keys are compared, whatever the first comparison said."""
        if not self._callers:
            return Caller(self._owner(_network(address)))
        presented = {hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest() for key in _presented(headers)}
        found = {digest for digest in presented for known in self._callers if hmac.compare_digest(digest, known)}
        return self._callers[found.pop()] if len(found) == 1 else None

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
