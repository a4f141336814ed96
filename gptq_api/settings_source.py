"""Settings objects from the command line, the environment and a TOML file; everything that is not a setting is refused
by name, and so is a value that cannot be, with where it came from."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsError,
    TomlConfigSettingsSource,
)

from gptq_api.config import ALL_SETTINGS, ENV_PREFIX, CommandSettings, ConfigError, flag

S = TypeVar("S", bound=CommandSettings)


def load_settings(cls: type[S], args: Sequence[str] = (), *, prog: str = "gptq-api") -> S:
    """Command line, environment and TOML file -> one frozen settings object.

    Leading arguments without a flag fill `cls.positional`. Raises ConfigError; `--help` prints and raises
    SystemExit(0).
    """
    known = {name.upper() for kind in ALL_SETTINGS for name in kind.model_fields}
    known.add("CUDA")  # GPTQ_API_CUDA belongs to the build; whoever exported it for that may still start a server
    for name in sorted(os.environ):
        if name.upper().startswith(ENV_PREFIX) and name.upper().removeprefix(ENV_PREFIX) not in known:
            hint = _did_you_mean(name.upper().removeprefix(ENV_PREFIX), known, lambda close: ENV_PREFIX + close)
            raise ConfigError(f"environment variable {name} is not a setting{hint}")
    flags = _flags(cls, args)
    toml_file = _config_file(flags)

    class Sourced(cls):  # type: ignore[valid-type, misc]
        __doc__ = cls.__doc__

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            if toml_file is None:
                return init_settings, env_settings
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file)

    try:
        cli: CliSettingsSource[Any] = CliSettingsSource(Sourced, cli_prog_name=prog, cli_exit_on_error=False)
        merged = Sourced(_cli_settings_source=cli(args=flags))
    except ValidationError as error:
        raise ConfigError(_first_error(cls, prog, error, flags, toml_file)) from None
    except SettingsError as error:
        raise ConfigError(str(error).splitlines()[0].removeprefix("error parsing CLI: ")) from None
    values = {name: getattr(merged, name) for name in cls.model_fields}
    return cast(S, cls.model_construct(_fields_set=merged.model_fields_set, **values))


def _flags(cls: type[CommandSettings], args: Sequence[str]) -> list[str]:
    """Arguments with leading positional ones spelled out as flags. Refuses unknown flags by name."""
    rest = list(args)
    flags: list[str] = []
    for name in cls.positional:
        takes_all = get_origin(cls.model_fields[name].annotation) is list
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


def _config_file(flags: Sequence[str]) -> Path | None:
    """The TOML file has to be known before the settings are: look for it in the two places that can name it."""
    named: str | None = os.environ.get(ENV_PREFIX + "CONFIG")
    for i, item in enumerate(flags):
        if item == "--config" and i + 1 < len(flags):
            named = flags[i + 1]
        elif item.startswith("--config="):
            named = item.removeprefix("--config=")
    if named is None:
        return None
    path = Path(named)
    try:
        tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not valid TOML: {error}") from None
    return path


def _first_error(
    cls: type[CommandSettings], prog: str, error: ValidationError, flags: Sequence[str], toml_file: Path | None
) -> str:
    """One sentence: which setting, where it came from, what is wrong."""
    first = error.errors(include_url=False, include_context=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    name = str(first["loc"][0])
    name = next((field for field in cls.model_fields if flag(field) == f"--{name}"), name)
    if first["type"] == "missing":
        shown = " ".join(positional.removesuffix("_path").upper() for positional in cls.positional)
        return f"{flag(name)} is missing: {prog} {shown}"
    if any(item.split("=", 1)[0] == flag(name) for item in flags):
        source = flag(name)
    elif any(key.upper() == ENV_PREFIX + name.upper() for key in os.environ):
        source = f"environment variable {ENV_PREFIX}{name.upper()}"
    else:
        source = f"key {name} in {toml_file}"
    if first["type"] == "extra_forbidden":
        return f"{source} is not a setting{_did_you_mean(name, set(cls.model_fields), str)}"
    value = first["input"] if isinstance(first["input"], str | int | float | bool) else type(first["input"]).__name__
    return f"{source}: {message} (got {str(value)[:80]!r})"


def _did_you_mean(name: str, known: set[str], spell: Callable[[str], str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {spell(close[0])}?" if close else ""
