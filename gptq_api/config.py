"""Settings: every knob once. A field `max_num_seqs` is the CLI flag `--max-num-seqs`, the environment variable
`GPTQ_API_MAX_NUM_SEQS` and the TOML key `max_num_seqs`; the docstring under it is its help text.

Precedence: command line, environment, TOML file (`--config FILE` or `GPTQ_API_CONFIG`), default. Unknown flags, keys
and GPTQ_API_* variables are refused by name.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator
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
    """What `serve` knows. Frozen: built once at the root, plain arguments below it."""

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
    """Jinja file used instead of the checkpoint's chat template, or the name of a built-in one (vicuna_v1.1, llama-2 ...)."""
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

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        toml = _toml_file
        if toml is None:
            return init_settings, env_settings
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml)


class ChatSettings(Settings):
    """What `chat` knows besides."""

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
    """What `inspect` knows besides."""

    json_output: bool = Field(False, alias="json")
    """Print JSON."""


_toml_file: Path | None = None
S = TypeVar("S", bound=Settings)


def load_settings(cls: type[S], args: Sequence[str], *, prog: str = "gptq-api", env: Mapping[str, str] | None = None) -> S:
    """Command line, environment and TOML file -> one frozen settings object.

    The first positional argument is `--model-path`. Raises ConfigError; `--help` prints and raises SystemExit(0).
    """
    global _toml_file
    env = os.environ if env is None else env
    known = {name.upper() for name in cls.model_fields} | {name.upper() for name in ChatSettings.model_fields}
    for name in env:
        if name.startswith(ENV_PREFIX) and name.removeprefix(ENV_PREFIX).upper() not in known:
            raise ConfigError(f"environment variable {name} is not a setting{_did_you_mean(name, env_names(cls))}")
    flags = _positional_model_path(list(args))
    _toml_file = _config_file(flags, env)
    try:
        cli = CliSettingsSource[Any](
            cls, cli_prog_name=prog, cli_parse_args=flags, cli_exit_on_error=False, formatter_class=_HelpFormatter
        )
        return cls(_cli_settings_source=cli)  # type: ignore[call-arg]
    except ValidationError as error:
        raise ConfigError(_first_error(error, cls)) from None
    except SettingsError as error:
        raise ConfigError(_plain(str(error), cls)) from None
    finally:
        _toml_file = None
