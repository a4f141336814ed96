"""Settings: every knob once. A field `max_num_seqs` is the CLI flag `--max-num-seqs`, the environment variable
`GPTQ_API_MAX_NUM_SEQS` and the TOML key `max_num_seqs`; the docstring under it is its help text.

Precedence: command line, environment, TOML file (`--config FILE` or `GPTQ_API_CONFIG`), default. Unknown flags, keys
and GPTQ_API_* variables are refused by name.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

from pydantic import AliasChoices, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

ENV_PREFIX = "GPTQ_API_"


class ConfigError(ValueError):
    """A setting is wrong; the text names the field, its source and the remedy. The command exits with status 2."""


class Settings(BaseSettings):
    """The server for 4-bit GPTQ LLaMA checkpoints. Every option is also a GPTQ_API_* variable and a TOML key."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        protected_namespaces=(),
    )

    # The model
    model_path: str = "demo"
    """Checkpoint folder (or a .safetensors / .pt file in one). `demo` is the small model in the package."""
    served_model_name: str | None = None
    """Name in /v1/models and in requests. Default: the folder's name."""
    gptq_wbits: Literal[2, 3, 4, 8] | None = None
    """Expected bits. Read from the tensors anyway; a contradiction is an error."""
    gptq_groupsize: int | None = None
    """Expected group size (-1: one group). Read from the tensors anyway; a contradiction is an error."""
    gptq_ckpt: Path | None = None
    """The weights file, where the folder holds more than one."""
    gptq_act_order: bool | None = None
    """Expected act-order. Read from the tensors anyway; a contradiction is an error."""
    chat_template: Path | None = None
    """Jinja file used instead of the checkpoint's chat template, or a built-in one by name (vicuna_v1.1)."""
    max_model_len: int | None = Field(None, ge=1)
    """Longest prompt plus answer, tokens. Default: what the checkpoint was trained for."""

    # The engine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Activation type. float32 is the exact path; auto is bfloat16 on the CPU and the checkpoint's type on CUDA."""
    block_size: int = Field(16, ge=1, le=256)
    """Tokens per KV cache block."""
    num_blocks: int | None = Field(None, ge=1)
    """KV cache blocks. Default: what the memory setting of the device allows."""
    kv_cache_mib: int = Field(512, ge=1)
    """Memory for the KV cache on the CPU, MiB."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of the GPU's memory for weights, KV cache and workspace together."""
    max_num_seqs: int = Field(256, ge=1, le=4096)
    """Sequences in one step."""
    max_num_batched_tokens: int | None = Field(None, ge=1)
    """Tokens computed in one step; longer prompts are computed in chunks. Default: 512 on the CPU, 2048 on CUDA."""
    max_queued_requests: int = Field(512, ge=1)
    """Sequences admitted at a time, running and waiting; beyond it requests get 429 with Retry-After."""
    enable_prefix_caching: bool = True
    """Reuse the KV cache of prompts that begin alike."""
    num_threads: int | None = Field(None, ge=1)
    """CPU threads of the engine. Default: the cores this process may use."""

    # The server
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs --api-key or --allow-unauthenticated."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0 picks a free one and prints it."""
    api_key: list[str] = []
    """Accepted bearer tokens, separated by commas; none: no authentication."""
    allow_unauthenticated: bool = False
    """Listen on a non-loopback address without an API key."""
    strict_params: bool = False
    """Answer 400 to unknown request fields instead of naming them in the x-unsupported-params header."""
    max_body_bytes: int = Field(8 * 2**20, ge=1024)
    """Largest request body; more is answered 413."""
    header_timeout_s: float = Field(10.0, gt=0)
    """Time a client has to send a request's headers."""
    body_timeout_s: float = Field(30.0, gt=0)
    """Time a client has to send a request's body."""
    send_timeout_s: float = Field(30.0, gt=0)
    """Time a client may leave a stream unread before it is cancelled."""
    sse_ping_s: float = Field(15.0, gt=0)
    """Seconds between keep-alive comments in a stream."""
    drain_timeout_s: float = Field(30.0, ge=0)
    """Seconds running requests have to finish after SIGTERM or ^C."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe messages that are logged."""
    log_json: bool = False
    """One JSON object per log line."""
    config: Path | None = None
    """TOML file with any of these settings."""

    @field_validator("gptq_wbits", mode="before")
    @classmethod
    def _wbits(cls, value: object) -> object:
        return int(value) if isinstance(value, str) and value.isdecimal() else value

    @field_validator("gptq_groupsize")
    @classmethod
    def _groupsize(cls, value: int | None) -> int | None:
        if value is not None and value != -1 and value < 1:
            raise ValueError("is -1 (one group) or a positive number such as 128")
        return value

    @field_validator("api_key", mode="before")
    @classmethod
    def _keys(cls, value: object) -> object:
        keys = [value] if isinstance(value, str) else value
        if isinstance(keys, list) and not all(isinstance(key, str) and key for key in keys):
            raise ValueError("holds an empty key")
        return keys

    @model_validator(mode="after")
    def _exposure(self) -> Settings:
        loopback = self.host in ("localhost", "::1") or self.host.startswith("127.")
        if not loopback and not self.api_key and not self.allow_unauthenticated:
            raise ValueError(
                f"host {self.host} is reachable from other machines: set --api-key KEY, or --allow-unauthenticated"
            )
        return self


class ChatSettings(Settings):
    """Chat with a GPTQ checkpoint in the terminal."""

    url: str | None = None
    """Talk to a running server (its /v1 address) instead of loading the model."""
    system: str | None = None
    """System prompt."""
    temperature: float = Field(0.7, ge=0, le=2)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest answer, tokens. Default: what the context leaves."""
    seed: int | None = None
    """Seed of the sampler."""


class InspectSettings(Settings):
    """Print what a checkpoint is, without loading its weights."""

    json_output: bool = Field(False, validation_alias=AliasChoices("json", "json_output"))
    """Print JSON."""


S = TypeVar("S", bound=Settings)


def load_settings(cls: type[S], args: Sequence[str] = (), *, prog: str = "gptq-api") -> S:
    """Command line, environment and TOML file -> one frozen settings object.

    The first positional argument is `--model-path`. Raises ConfigError; `--help` prints and raises SystemExit(0).
    """
    known = {name.upper() for kind in (Settings, ChatSettings, InspectSettings) for name in kind.model_fields}
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
        raise ConfigError(_first_error(error, flags, toml_file)) from None
    except SettingsError as error:
        raise ConfigError(str(error).splitlines()[0].removeprefix("error parsing CLI: ")) from None
    values = {name: getattr(merged, name) for name in cls.model_fields}
    return cast(S, cls.model_construct(_fields_set=merged.model_fields_set, **values))


def flag(name: str) -> str:
    """`max_num_seqs` -> `--max-num-seqs`."""
    return "--" + {"json_output": "json"}.get(name, name).replace("_", "-")


def _flags(cls: type[Settings], args: Sequence[str]) -> list[str]:
    """Arguments with a leading positional one spelled out as --model-path. Refuses unknown flags by name."""
    flags = list(args)
    if flags and not flags[0].startswith("-"):
        flags = ["--model-path", *flags]
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


def _first_error(error: ValidationError, flags: Sequence[str], toml_file: Path | None) -> str:
    """One sentence: which setting, where it came from, what is wrong."""
    first = error.errors(include_url=False, include_context=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    name = str(first["loc"][0])
    name = "json_output" if name == "json" else name
    if any(item.split("=", 1)[0] == flag(name) for item in flags):
        source = flag(name)
    elif any(key.upper() == ENV_PREFIX + name.upper() for key in os.environ):
        source = f"environment variable {ENV_PREFIX}{name.upper()}"
    else:
        source = f"key {name} in {toml_file}"
    if first["type"] == "extra_forbidden":
        return f"{source} is not a setting{_did_you_mean(name, set(Settings.model_fields), str)}"
    value = first["input"] if isinstance(first["input"], str | int | float | bool) else type(first["input"]).__name__
    return f"{source}: {message} (got {str(value)[:80]!r})"


def _did_you_mean(name: str, known: set[str], spell: Callable[[str], str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {spell(close[0])}?" if close else ""
