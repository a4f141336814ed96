"""Settings objects from the command line, the environment and a TOML file; everything that is not a setting is refused
by name, and so is a value that cannot be, with where it came from."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsError,
)

from gptq_api.config import ALL_SETTINGS, ENV_PREFIX, CommandSettings, ConfigError, flag, takes_list

S = TypeVar("S", bound=CommandSettings)


@dataclass(frozen=True, slots=True)
class _Source:
    """What the environment or the file says."""

    values: dict[str, Any] = field(default_factory=dict)
    """by the name of the field"""
    written: dict[str, str] = field(default_factory=dict)
    """by the name of the field: the place and the spelling, for a sentence"""


def load_settings(cls: type[S], args: Sequence[str] = (), *, prog: str = "gptq-api") -> S:
    """Command line, environment and TOML file -> one frozen settings object.

    Leading arguments without a flag fill `cls.positional`. Raises ConfigError; `--help` prints and raises
    SystemExit(0).
    """
    flags = _flags(cls, args)
    environment = _environment(cls)
    file = _config_file(flags, environment)
    sources = [environment] if file is None else [environment, _toml(cls, file)]

    class Sourced(cls):  # type: ignore[valid-type, misc]
        __doc__ = cls.__doc__

        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **others: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, *(InitSettingsSource(settings_cls, source.values) for source in sources)

    try:
        cli: CliSettingsSource[Any] = CliSettingsSource(Sourced, cli_prog_name=prog, cli_exit_on_error=False)
        merged = Sourced(_cli_settings_source=cli(args=flags))
    except ValidationError as error:
        raise ConfigError(_first_error(cls, prog, error, flags, sources)) from None
    except SettingsError as error:
        raise ConfigError(str(error).splitlines()[0].removeprefix("error parsing CLI: ")) from None
    values = {name: getattr(merged, name) for name in cls.model_fields}
    return cast(S, cls.model_construct(_fields_set=merged.model_fields_set, **values))


def _spellings(cls: type[CommandSettings]) -> dict[str, str]:
    """Every name of a setting, with underscores, -> its field: the field's own, and its flag's (`json`)."""
    of_flags = {flag(name).removeprefix("--").replace("-", "_"): name for name in cls.model_fields}
    return of_flags | {name: name for name in cls.model_fields}


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
    """The keys of a file, spelled with underscores or like the flags. Raises ConfigError."""
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {file} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {file} is not valid TOML: {error}") from None
    spellings, found = _spellings(cls), []
    for key, value in content.items():
        plain = key.replace("-", "_").lower()
        if plain not in spellings:
            hint = _did_you_mean(plain, set(spellings), _hyphens if "-" in key else str)
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


def _flags(cls: type[CommandSettings], args: Sequence[str]) -> list[str]:
    """Arguments with leading positional ones spelled out as flags. Refuses unknown flags by name."""
    rest = list(args)
    flags: list[str] = []
    for name in cls.positional:
        takes_all = takes_list(cls.model_fields[name].annotation)
        while rest and not rest[0].startswith("-"):
            flags += [flag(name), rest.pop(0)]
            if not takes_all:
                break
    flags += rest
    known = {flag(name) for name in cls.model_fields} | {"--help"}
    known |= {"--no-" + flag(name)[2:] for name, field in cls.model_fields.items() if _is_bool(field.annotation)}
    for item in flags:
        name = item.split("=", 1)[0]
        if name.startswith("--") and name not in known:
            raise ConfigError(f"{name} is not an option{_did_you_mean(name, known, str)}")
    return flags


def _is_bool(annotation: Any) -> bool:
    return annotation is bool or bool in get_args(annotation)


def _config_file(flags: Sequence[str], environment: _Source) -> Path | None:
    """The TOML file has to be known before the settings are: look for it in the two places that can name it."""
    named: str | None = environment.values.get("config")
    for i, item in enumerate(flags):
        if item == "--config" and i + 1 < len(flags):
            named = flags[i + 1]
        elif item.startswith("--config="):
            named = item.removeprefix("--config=")
    return Path(named) if named else None  # an empty name is refused with the other values


def _first_error(
    cls: type[CommandSettings], prog: str, error: ValidationError, flags: Sequence[str], sources: Sequence[_Source]
) -> str:
    """One sentence: which setting, where it came from, what is wrong."""
    first = error.errors(include_url=False, include_context=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    name = _spellings(cls)[str(first["loc"][0])]
    if first["type"] == "missing":
        shown = " ".join(positional.removesuffix("_path").upper() for positional in cls.positional)
        return f"{flag(name)} is missing: {prog} {shown}"
    if any(item.split("=", 1)[0] == flag(name) for item in flags):
        written = flag(name)
    else:
        written = next(source.written[name] for source in sources if name in source.written)
    value = first["input"] if isinstance(first["input"], str | int | float | bool) else type(first["input"]).__name__
    shown_value = f" (got {str(value)[:80]!r})" if value != "" and cls.model_fields[name].repr else ""
    return f"{written}: {message}{shown_value}"


def _hyphens(name: str) -> str:
    return name.replace("_", "-")


def _did_you_mean(name: str, known: set[str], spell: Callable[[str], str]) -> str:
    """`spell` writes what is known as the user writes."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {spell(close[0])}?" if close else ""
