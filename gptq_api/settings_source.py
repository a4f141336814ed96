"""Settings objects from the command line, the environment and a TOML file; everything that is not a setting is refused
by name, and so is a value that cannot be, with where it came from."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from gptq_api.config import ALIASES, ALL_SETTINGS, COMMANDS, ENV_PREFIX, CommandSettings, flag, takes_list
from gptq_api.errors import ConfigError
from gptq_api.settings_help import page, usage
from gptq_api.settings_words import taken, wrong_value

S = TypeVar("S", bound=CommandSettings)


@dataclass(slots=True)
class _Source:
    """What the command line, the environment or the file says."""

    values: dict[str, Any] = field(default_factory=dict)
    """by the name of the field"""
    written: dict[str, str] = field(default_factory=dict)
    """by the name of the field: the place and the spelling, for a sentence"""


def load_settings(cls: type[S], args: Sequence[str] = (), *, prog: str = "gptq-api") -> S:
    """Command line, environment and TOML file -> one frozen settings object.

    Leading arguments without a flag fill `cls.positional`. Raises ConfigError; `--help` prints and raises
    SystemExit(0).
    """
    if {"-h", "--help", "--help-all"} & set(args):
        print(page(cls, prog, everything="--help-all" in args))
        raise SystemExit(0)
    command_line = _command_line(cls, args, prog)
    environment = _environment(cls)
    sources = [command_line, environment]
    if named := command_line.values.get("config") or environment.values.get("config"):
        sources.append(_toml(cls, Path(named)))  # an empty name is refused with the other values
    written = {name: how for source in reversed(sources) for name, how in source.written.items()}
    values = {name: value for source in reversed(sources) for name, value in source.values.items()}
    try:
        settings = cls(**values)
    except ValidationError as error:
        raise ConfigError(_first_error(cls, prog, error, written)) from None
    settings.check_given(command_line.written, written)
    return settings


@cache
def _spellings(cls: type[CommandSettings]) -> dict[str, str]:
    """Every name of a setting, with underscores, -> its field: the field's own, and its flag's (`json`)."""
    of_flags = {flag(name).removeprefix("--").replace("-", "_"): name for name in cls.model_fields}
    others = {alias: name for alias, name in ALIASES.items() if name in cls.model_fields}
    return of_flags | others | {name: name for name in cls.model_fields}


def _environment(cls: type[CommandSettings]) -> _Source:
    """The GPTQ_API_* variables; those of other commands are passed over. Raises ConfigError."""
    known = {name.upper() for kind in ALL_SETTINGS for name in _spellings(kind)}
    known.add("CUDA")  # GPTQ_API_CUDA belongs to the build; whoever exported it for that may still start a server
    spellings, found = _spellings(cls), []
    for variable, value in sorted(os.environ.items()):
        name = variable.upper()
        if not name.startswith(ENV_PREFIX):
            continue
        name = name.removeprefix(ENV_PREFIX)
        if name not in known:
            hint = _did_you_mean(name, known, lambda close: ENV_PREFIX + close)
            raise ConfigError(f"environment variable {variable} is not a setting{hint}")
        if name.lower() in spellings:
            found.append((spellings[name.lower()], f"environment variable {variable}", value))
    return _source(found)


def _toml(cls: type[CommandSettings], file: Path) -> _Source:
    """The keys of a file, spelled with underscores or like the flags; those of other commands are passed over. Raises
    ConfigError."""
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {file} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {file} is not valid TOML: {error}") from None
    known = {name for kind in ALL_SETTINGS for name in _spellings(kind)}
    spellings, found = _spellings(cls), []
    for key, value in content.items():
        plain = key.replace("-", "_").lower()
        if plain not in spellings:
            if plain in known:
                continue
            hint = _did_you_mean(plain, known, _hyphens if "-" in key else str)
            raise ConfigError(f"key {key} in {file} is not a setting{hint}")
        name = spellings[plain]
        if name == "config":
            raise ConfigError(f"key {key} in {file}: a settings file does not name another one")
        found.append((name, f"key {key} in {file}", value))
    return _source(found)


def _source(found: Iterable[tuple[str, str, Any]]) -> _Source:
    """Of fields, how they are written, and values. ConfigError where one setting is there in two spellings."""
    source = _Source()
    for name, written, value in found:
        if name in source.values:
            raise ConfigError(f"{source.written[name]} and {written} are the same setting; keep one of them")
        source.values[name], source.written[name] = value, written
    return source


def _command_line(cls: type[CommandSettings], args: Sequence[str], prog: str) -> _Source:
    """The flags, and leading arguments as those that they stand for. Of a flag that is repeated the last one counts,
    and lists add up. Raises ConfigError."""
    fields = {flag(spelling): name for spelling, name in _spellings(cls).items()}
    opposites = {"--no-" + flag(name)[2:]: name for name in cls.model_fields if _is_bool(cls.model_fields[name])}
    rest, source = list(args), _Source()

    def take(name: str, written: str, value: str) -> None:
        if takes_list(cls.model_fields[name].annotation) and name in source.values:
            value = f"{source.values[name]},{value}"
        source.values[name], source.written[name] = value, written

    for name in cls.positional:
        while rest and not rest[0].startswith("-"):
            take(name, flag(name), rest.pop(0))
            if not takes_list(cls.model_fields[name].annotation):
                break
    behind = {fields[spelled] for spelled in (item.partition("=")[0] for item in rest) if spelled in fields}
    leading = cls.rearranged(dict(source.values), behind)
    source.values, source.written = leading, {name: flag(name) for name in leading}
    named_first = dict(leading)
    while rest:
        item = rest.pop(0)
        spelled, equals, value = item.partition("=")
        if not item.startswith("-") or item in ("-", "--"):
            raise ConfigError(f"{item!r} is not expected there: {usage(cls, prog)}")
        if spelled not in fields.keys() | opposites.keys():
            raise ConfigError(_unknown_flag(cls, spelled, {*fields, *opposites}, prog))
        name = fields.get(spelled) or opposites[spelled]
        if _is_bool(cls.model_fields[name]):
            if equals and spelled in opposites:
                raise ConfigError(f"{spelled} takes no value; leave {'=' + value!r} out")
            if rest and not rest[0].startswith("-"):
                raise ConfigError(f"{spelled} takes no value; leave {rest[0]!r} out")
            take(name, spelled, value if equals else str(spelled in fields).lower())
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                like = f" ({spelled}={rest[0]}, where that is the value)" if rest else ""
                takes = taken(cls.model_fields[name])
                raise ConfigError(f"{spelled} lacks its value{like}: it takes {takes}")
            value = rest.pop(0)
        if name in named_first and value != named_first[name] and not takes_list(cls.model_fields[name].annotation):
            raise ConfigError(f"{named_first[name]!r} and {spelled} {value!r} are the same setting; keep one of them")
        take(name, spelled, value)
    return source


def _unknown_flag(cls: type[CommandSettings], spelled: str, known: set[str], prog: str) -> str:
    """A sentence: the flag that was meant, or the commands that have it."""
    others = [name for name, kind in COMMANDS.items() if kind is not cls and _has_flag(kind, spelled)]
    here = f" of {prog}" if prog.startswith("gptq-api ") else ""
    if others and here:
        have = f"{', '.join(others[:-1])} and {others[-1]} have" if len(others) > 1 else f"{others[0]} has"
        return f"{spelled} is not an option{here}; gptq-api {have} it"
    hint = _did_you_mean(spelled, known, str)
    return f"{spelled} is not an option{here}{hint or f'; {prog} --help lists them'}"


def _has_flag(cls: type[CommandSettings], spelled: str) -> bool:
    return any(
        spelled == flag(name) or (spelled == "--no-" + flag(name)[2:] and _is_bool(field))
        for name, field in cls.model_fields.items()
    )


def _is_bool(field: FieldInfo) -> bool:
    return field.annotation is bool or bool in get_args(field.annotation)


def _first_error(cls: type[CommandSettings], prog: str, error: ValidationError, written: Mapping[str, str]) -> str:
    """One sentence: which setting, where it came from, what is wrong."""
    first = error.errors(include_url=False)[0]
    if not first["loc"]:
        return first["msg"].removeprefix("Value error, ")
    name = _spellings(cls)[str(first["loc"][0])]
    if first["type"] == "missing":
        return f"{flag(name)} is missing: {usage(cls, prog)}"
    return f"{written[name]}: {wrong_value(cls.model_fields[name], first)}"


def _hyphens(name: str) -> str:
    return name.replace("_", "-")


def _did_you_mean(name: str, known: set[str], spell: Callable[[str], str]) -> str:
    """`spell` writes what is known as the user writes."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {spell(close[0])}?" if close else ""
