"""What a configuration claims about single modules: one claim for all, and GPTQModel's `dynamic` or AutoRound's
`extra_config`, which override it for some."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import regex

from gptq_api.checkpoint.errors import CheckpointError

_MAX_RULES = 10_000
_MAX_PATTERN = 1000
_MATCH_SECONDS = 0.5
"""for all matches of a configuration together: a pattern can be made to take years"""


@dataclass(frozen=True)
class Claim:
    """What is said of a module; None: nothing."""

    quantized: bool | None = None
    bits: int | None = None
    group_size: int | None = None
    desc_act: bool | None = None
    sym: bool | None = None


@dataclass(frozen=True)
class Rule:
    """An override for the modules whose name `pattern` matches from the start (`dynamic`), or is (`extra_config`)."""

    pattern: str
    exact: bool
    claim: Claim


def parse_dynamic(raw: Any, source: str) -> tuple[Rule, ...]:
    """GPTQModel: an ordered object of regex -> overrides; `-:` in front means not quantized, `+:` nothing; the first
    match wins. CheckpointError for what is none of that."""
    rules = []
    for key, value in _entries(raw, source, "dynamic"):
        pattern = key[2:] if key[:2] in ("-:", "+:") else key
        try:
            regex.compile(pattern)
        except (regex.error, OverflowError, RecursionError, ValueError) as error:
            raise CheckpointError(f"{source}: dynamic holds {key[:60]!r}, no regular expression ({error})") from None
        claim = Claim(quantized=False) if key.startswith("-:") else parse_claim(value, f"{source} (dynamic)")
        rules.append(Rule(pattern, False, claim))
    return tuple(rules)


def parse_extra_config(raw: Any, source: str) -> tuple[Rule, ...]:
    """AutoRound: module name -> overrides; 16 bits or more mean not quantized."""
    rules = []
    for key, value in _entries(raw, source, "extra_config"):
        claim = parse_claim(value, f"{source} (extra_config)")
        if claim.bits is not None and claim.bits >= 16:
            claim = Claim(quantized=False)
        rules.append(Rule(key, True, claim))
    return tuple(rules)


def parse_claim(raw: dict[str, Any], source: str) -> Claim:
    """Synonyms of five years (w_bit, q_group_size) in one place."""
    return Claim(
        bits=_number(raw, source, "bits", "w_bit", "wbits"),
        group_size=_number(raw, source, "group_size", "q_group_size", "groupsize"),
        desc_act=_flag(raw, source, "desc_act"),
        sym=_flag(raw, source, "sym"),
    )


class ClaimTable:
    """The claim about any module. Remembers how long matching took: a rule that would not end is left out."""

    def __init__(self, default: Claim, rules: tuple[Rule, ...]) -> None:
        self._default = default
        self._exact = {rule.pattern: rule.claim for rule in rules if rule.exact}
        self._patterns = [(regex.compile(rule.pattern), rule.claim) for rule in rules if not rule.exact]
        self._left = _MATCH_SECONDS
        self.gave_up = False

    def of(self, module: str) -> Claim:
        claim = self._exact.get(module) or self._match(module)
        if claim is None or claim.quantized is False:
            return claim or self._default
        given = {key: value for key, value in vars(claim).items() if value is not None}
        return replace(self._default, **given)

    def _match(self, module: str) -> Claim | None:
        for pattern, claim in self._patterns:
            if self.gave_up:
                return Claim()
            started = time.monotonic()
            try:
                matched = pattern.match(module, timeout=max(self._left, 0.001))
            except TimeoutError:
                self.gave_up = True
                return Claim()
            self._left -= time.monotonic() - started
            if matched:
                return claim
        return None


def _entries(raw: Any, source: str, key: str) -> list[tuple[str, dict[str, Any]]]:
    if not raw:
        return []
    if not isinstance(raw, dict) or len(raw) > _MAX_RULES or any(len(name) > _MAX_PATTERN for name in raw):
        raise CheckpointError(f"{source}: {key} is no object of at most {_MAX_RULES} module names")
    for name, value in raw.items():
        if not isinstance(value, dict):
            raise CheckpointError(f"{source}: {key}[{name[:60]!r}] is {value!r:.60} where an object is expected")
    return list(raw.items())


def _number(raw: dict[str, Any], source: str, *keys: str) -> int | None:
    for key in keys:
        value = raw.get(key)
        if value is not None:
            if not isinstance(value, int) or isinstance(value, bool):
                raise CheckpointError(f"{source}: {key} is {value!r:.60} where an integer is expected")
            return value
    return None


def _flag(raw: dict[str, Any], source: str, key: str) -> bool | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{source}: {key} is {value!r:.60} where true or false is expected")
    return value
