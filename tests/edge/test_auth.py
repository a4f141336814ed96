"""Who a caller is."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from starlette.datastructures import Headers

from gptq_api.edge.auth import Authenticator, Caller
from gptq_api.edge.keys import KeyFile


def caller(auth: Authenticator, address: str = "", key: str = "") -> Caller:
    found = auth.check(Headers({"authorization": f"Bearer {key}"} if key else {}), address)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("127.0.0.1", "::1"),
        ("127.0.0.1", "127.8.9.10"),
        ("127.0.0.1", "::ffff:127.0.0.1"),
        ("10.0.0.1", "::ffff:10.0.0.1"),
        ("2001:db8:1:2::3", "2001:db8:1:2:ffff::4"),
        ("fe80::1%eth0", "fe80::2%eth1"),
        ("", ""),
    ],
)
def test_addresses_of_one_owner(one: str, other: str) -> None:
    auth = Authenticator([])
    assert caller(auth, one).owner == caller(auth, other).owner


def test_addresses_of_several_owners() -> None:
    auth = Authenticator([])
    addresses = ("127.0.0.1", "10.0.0.1", "10.0.0.2", "2001:db8:1:2::3", "2001:db8:1:3::3", "")
    assert len({caller(auth, address).owner for address in addresses}) == len(addresses)
    assert {caller(auth, address).salt for address in addresses} == {b""}, "and they share cached prefixes"


def test_with_keys_the_address_is_nothing() -> None:
    auth = Authenticator(["first", "second"])
    assert caller(auth, "10.0.0.1", "first") is caller(auth, "10.0.0.2", "first")
    first, second = caller(auth, key="first"), caller(auth, key="second")
    assert first.owner != second.owner and first.salt != second.salt
    assert auth.check(Headers({}), "127.0.0.1") is None


def test_nothing_of_an_owner_can_be_looked_up() -> None:
    """Whoever knows a list of addresses or keys finds none of them by what is sent and stored."""
    for address, key in (("10.0.0.1", ""), ("", "first")):
        keys = [key] if key else []
        one, other = (caller(Authenticator(keys), address, key) for _ in range(2))
        assert one.owner != other.owner and len(one.owner) == 16
        assert one.salt == other.salt


@pytest.mark.parametrize(
    ("keys", "host", "answer"),
    [
        ([], "127.0.0.1", False),
        ([], "localhost", False),
        ([], "0.0.0.0", True),
        (["key"], "0.0.0.0", False),
        (["key", "key"], "0.0.0.0", False),
        (["key", "other"], "127.0.0.1", True),
    ],
)
def test_whether_callers_may_differ(keys: list[str], host: str, answer: bool) -> None:
    assert Authenticator(keys).may_differ(host) is answer


def test_a_key_that_may_only_read_metrics_is_no_other_caller(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    user, watcher = ('[[key]]\nname = "a"\nkey = "1"\n', '[[key]]\nname = "b"\nkey = "2"\nrole = "metrics"\n')
    file.write_text(user + watcher)
    assert not Authenticator([], KeyFile(file)).may_differ("0.0.0.0")
    assert Authenticator(["3"], KeyFile(file)).may_differ("0.0.0.0")


def test_a_key_that_is_replaced_goes_on_under_its_name(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text('[[key]]\nname = "a"\nkey = "old"\nrequests_per_minute = 5\n[[key]]\nname = "b"\nkey = "b"\n')
    auth = Authenticator(["fixed"], KeyFile(file))
    old, fixed = caller(auth, key="old"), caller(auth, key="fixed")
    assert old.account is not None and fixed.account is None and auth.accounts.keys() == {"a", "b"}
    old.account.begin(time.monotonic())
    file.write_text('[[key]]\nname = "a"\nkey = "new"\nrequests_per_minute = 6\npriority = -3\n')
    auth._use(KeyFile(file).read())
    new = caller(auth, key="new")
    assert auth.check(Headers({"x-api-key": "old"}), "") is None and auth.check(Headers({"x-api-key": "b"}), "") is None
    assert new.account is old.account and new.owner == old.owner and new.level == -3
    assert new.salt != old.salt, "what its holder saw is not for the new one"
    assert caller(auth, key="fixed").owner == fixed.owner
    old.account.end(time.monotonic())
    assert (b"x-ratelimit-limit-requests", b"6") in new.headers() and auth.accounts.keys() == {"a"}
