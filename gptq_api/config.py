"""Settings: every knob once. A field `max_num_seqs` is the CLI flag `--max-num-seqs`, the environment variable
`GPTQ_API_MAX_NUM_SEQS` and the TOML key `max_num_seqs` or `max-num-seqs`; the docstring under it is its help text.

Precedence: command line, environment, TOML file (`--config FILE` or `GPTQ_API_CONFIG`), default. Unknown flags, keys
and GPTQ_API_* variables are refused by name; keys and variables that are settings of another command are passed over,
its flags are not. A list is split at commas; flags that are repeated add up.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

from pydantic import AliasChoices, Field, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from gptq_api.errors import ConfigError
from gptq_api.field_docs import describe

ENV_PREFIX = "GPTQ_API_"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")
_ZMQ = re.compile(r"tcp://(\*|\[[0-9a-fA-F:.*]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}|ipc://[^\s\0]+")
_NAME = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*|[0-9a-f:.]*:[0-9a-f:.]*")


class CommandSettings(BaseSettings):
    """What the settings of all commands have in common: how values are written. Made by hand it holds what it is given;
    settings_source.py reads the three sources."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        defer_build=True,  # of all the commands' settings one is used
    )
    positional: ClassVar[tuple[str, ...]] = ("model_path",)
    """fields that leading arguments without a flag fill, in this order; a list takes all that are left"""
    examples: ClassVar[tuple[str, ...]] = ()
    """command lines for --help"""
    seldom: ClassVar[frozenset[str]] = frozenset()
    """fields that --help leaves to --help-all"""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        describe(cls)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """None of the library's own, which decode what they read."""
        return (init_settings,)

    @classmethod
    def rearranged(cls, leading: dict[str, Any], behind: set[str]) -> dict[str, Any]:
        """Leading arguments by the field they fill, where they may stand for another one; `behind`: fields of the flags
        that follow."""
        return leading

    def check_given(self, on_command_line: Mapping[str, str], anywhere: Mapping[str, str]) -> None:
        """Of fields that are given how they are written. ConfigError for a flag that would do nothing beside others;
        variables and files may be those of several commands, and are passed over where they say nothing."""

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: object, info: ValidationInfo) -> object:
        """Flags and variables are text: lists are split, choices among numbers become numbers, nothing is no value."""
        assert info.field_name is not None
        field = cls.model_fields[info.field_name]
        annotation = field.annotation
        if field.repr:  # keys have a rule of their own
            _check_text(value)
        if takes_list(annotation):
            items = _items(value)
            if info.field_name == "models" and isinstance(items, list):
                return [_path(item) for item in items]
            return items
        if isinstance(value, str) and not value.strip() and str not in (annotation, *get_args(annotation)):
            raise ValueError("is empty; leave it out for its default")
        if info.field_name in ("model_path", "draft_model") or Path in (annotation, *get_args(annotation)):
            return _path(value)
        if isinstance(value, bool) and {int, float} & {annotation, *get_args(annotation)}:
            return str(value).lower()  # not 1
        return _number(value) if _chooses_number(annotation) else value


class ModelSettings(CommandSettings):
    """Which checkpoint is loaded, and how: what runner/options.py hands on."""

    # The model
    model_path: str = Field("demo", min_length=1)
    """Checkpoint folder (or a .safetensors / .pt file in one), or a name on the Hugging Face hub such as
    `TheBloke/vicuna-7B-1.1-GPTQ`. `demo` is the small model in the package."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub. Default: main."""
    gptq_wbits: Literal[2, 3, 4, 8] | None = None
    """Expected bits. Read from the tensors anyway; a contradiction is an error."""
    gptq_groupsize: int | None = None
    """Expected group size (-1: one group). Read from the tensors anyway; a contradiction is an error."""
    gptq_ckpt: Path | None = None
    """The weights file, where the folder holds more than one."""
    gptq_act_order: bool | None = None
    """Expected act-order. Read from the tensors anyway; a contradiction is an error."""
    max_model_len: int | None = Field(None, ge=1, le=2**24)
    """Longest prompt plus answer, tokens. Default: what the checkpoint was trained for."""

    # The engine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Activation type. float32 is the exact path. auto is the checkpoint's type on CUDA; on the CPU it is bfloat16, but
    for quantized products, whose activations are rounded to int8, which bfloat16 leaves as they are."""
    block_size: int = Field(16, ge=1, le=256)
    """Tokens per KV cache block."""
    num_blocks: int | None = Field(None, ge=1, lt=2**31)
    """KV cache blocks. Default: what the memory setting of the device allows."""
    kv_cache_mib: int = Field(512, ge=1, le=2**24)
    """Memory for the KV cache on the CPU, MiB."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """Type of the KV cache on CUDA. auto is that of the activations; fp8 (e4m3) takes half the memory and bandwidth."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of the GPU's memory for weights, KV cache and workspace together."""
    max_num_seqs: int = Field(256, ge=1, le=4096)
    """Sequences in one step."""
    max_num_batched_tokens: int | None = Field(None, ge=1, le=2**18)
    """Tokens computed in one step; longer prompts are computed in chunks, which are smaller beside sequences that
    decode. Default: 512 on the CPU, 2048 on CUDA."""
    num_threads: int | None = Field(None, ge=1, le=4096)
    """CPU threads of the engine. Default: the physical cores this process may use, and one for a small model."""
    tensor_parallel_size: int = Field(1, ge=1, le=8)
    """GPUs that share the model (FastChat's --num-gpus): each has a part of every Linear and of the KV cache. On the
    CPU, threads: to try it."""
    batch_invariant: bool = False
    """On CUDA: an answer's tokens and logprobs are the same bits whoever else is in the batch, in chunks, after
    preemption and behind a cached prefix, at the price of slower large batches. On the CPU they are so anyway."""
    lm_head_bits: Literal[16, 8] = 16
    """On CUDA: 8 rounds an output head in 16 bits to 8, in groups of 128 inputs. That takes half its bytes out of every
    step (of a 3-8B alone, 7 % of the time) and changes logits by some 0.6 % of their norm; with 100 sequences in a step
    and more it is slower. 16: as the checkpoint has it."""
    packed_cache: str = Field("auto", min_length=1)
    """Folder in which weights that were packed for the CPU are kept, so that the next start need only read them. auto
    is gptq-api/packed in $XDG_CACHE_HOME or ~/.cache; off keeps none. Models below 64 MiB are packed each time."""
    draft_model: str | None = Field(None, min_length=1)
    """Folder of a small model with the same vocabulary (GPTQ, float16 or bfloat16) or of an EAGLE-3 head for the served
    one, or its name on the hub: it guesses an answer's next tokens, and the served model computes several in one step;
    no token changes by it. The memory for the KV cache is shared by both, and it is asked only where it pays."""
    config: Path | None = None
    """TOML file with any of these settings."""

    @field_validator("gptq_groupsize")
    @classmethod
    def _groupsize(cls, value: int | None) -> int | None:
        return None if value is None else _group_size(value)


class EngineSettings(ModelSettings):
    """What an engine that answers is told besides, in a server or in this terminal; sent to the engine process."""

    served_model_name: str | None = None
    """Name in /v1/models and in requests. Default: the folder's name."""
    chat_template: Path | None = None
    """Jinja file used instead of the checkpoint's chat template, or a built-in one by name (vicuna_v1.1)."""
    max_queued_requests: int = Field(512, ge=1, le=10**6)
    """Sequences admitted at a time, running and waiting; beyond it requests get 429 with Retry-After. Where there may
    be several callers (keys, or addresses), an eighth is kept for those who hold few."""
    enable_prefix_caching: bool = True
    """Reuse the KV cache of prompts that begin alike."""
    speculate: Literal["off", "auto", "ngram"] = "auto"
    """Where an answer's next tokens can be guessed, compute several in one step; no token changes by it. ngram guesses
    from the sequence's own text and the request's prediction, auto also from past answers of the same key, each with
    what --draft-model guesses, and only where it pays."""
    engine_timeout_s: float | None = Field(None, gt=0)
    """Seconds an engine that has work may be silent; then requests, running and new ones, get 503 engine_stalled, and
    so do /health and /ready, until it speaks. Longer than any step. Default: 60 on CUDA, 600 on the CPU, where the
    chunk of a large model's prompt takes minutes."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe messages that are logged."""
    log_json: bool = False
    """One JSON object per log line."""
    trace: Path | None = None
    """File for one line of JSON per step of the engine: its sizes and times, and the token ids of prompts and answers.
    tools/replay.py runs it again."""

    @model_validator(mode="after")
    def _somebody_drafts(self) -> EngineSettings:
        if self.draft_model is not None and self.speculate == "off":
            raise ValueError("--draft-model guesses tokens, and --speculate off says not to; leave one of them out")
        return self


class Settings(EngineSettings):
    """The server for 4-bit GPTQ LLaMA checkpoints. Every option is also a GPTQ_API_* variable and a TOML key."""

    examples: ClassVar[tuple[str, ...]] = (
        "gptq-api serve",
        "gptq-api serve /models/vicuna-7B-GPTQ --port 9000",
        "gptq-api serve TheBloke/vicuna-7B-1.1-GPTQ --revision gptq-4bit-128g-actorder_True",
        "gptq-api serve --model-path /models/vicuna --gptq-wbits 4 --gptq-groupsize 128",
    )

    model_alias: list[str] = []
    """Other names that requests may give the model, separated by commas; answers have its own."""
    accept_any_model: bool = False
    """Serve requests for any model, for programs that have the name of another one written into them."""
    batch_dir: Path | None = None
    """Folder in which /v1/files and /v1/batches are kept, also when the server is killed; made where it is not there.
    Without it there are no such routes: what clients send is kept on no disk unless you say where."""
    batch_disk_mib: int = Field(10240, ge=1, le=2**24)
    """Most that files and answers of batches take in --batch-dir, MiB. Then uploads get 413, and batches wait."""
    batch_file_mib: int = Field(200, ge=1, le=2**11)
    """Largest file of requests, MiB. It has at most 50,000 lines, each as long as a body may be."""
    host: str = Field("127.0.0.1", min_length=1)
    """Address to listen on. Anything but loopback needs --api-key or --allow-unauthenticated."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0 picks a free one and prints it."""
    api_key: list[str] = Field([], repr=False)
    """Accepted bearer tokens, separated by commas; none: no authentication. Every user of the machine sees the flag's
    value in `ps`: --api-key-file and the variable keep it secret."""
    api_key_file: Path | None = None
    """File with accepted keys: one a line, or TOML with a name, a role and limits for each. Read again when it changes,
    and at SIGHUP."""
    allow_unauthenticated: bool = False
    """Listen on a non-loopback address without an API key."""
    allowed_host: list[str] = Field([], examples=[["models.example.com", "*.internal"]])
    """Host names a server without an API key answers to besides localhost and --host, separated by commas;
    *.example.com for all below one, * for any. One that listens for other machines answers to every IP address."""
    cors_origin: list[str] = Field([], examples=[["https://example.com", "http://localhost:3000"]])
    """Origins whose web pages may use the server (https://example.com), separated by commas; * for all. None by
    default."""
    web_page: bool = True
    """A page to chat at /; --no-web-page leaves it out."""
    strict_params: bool = False
    """Answer 400 to unknown request fields instead of naming them in the x-unsupported-params header."""
    max_body_bytes: int | None = Field(None, ge=1024)
    """Largest request body; more is answered 413. Default: 64 bytes for every token of the context, at least 2 MiB. All
    bodies that are being read together hold at most 32 MiB, or four times this."""
    header_timeout_s: float = Field(10.0, gt=0)
    """Time a client has to send a request's headers."""
    body_timeout_s: float = Field(30.0, gt=0)
    """Time a client has to send a request's body."""
    send_timeout_s: float = Field(30.0, gt=0)
    """Time a client may leave a stream unread before it is cancelled."""
    sse_ping_s: float = Field(15.0, gt=0)
    """Seconds between keep-alive comments in a stream."""
    on_engine_stall: Literal["wait", "kill"] = "wait"
    """What is done with an engine that has been silent for --engine-timeout-s. wait: it may speak again. kill: it is
    dead, see --restart-engine."""
    restart_engine: int = Field(0, ge=0, le=1000)
    """How often within ten minutes an engine that died is started again; meanwhile requests get 503 engine_loading.
    Then the server leaves with exit status 70, by default at once."""
    drain_timeout_s: float = Field(30.0, ge=0)
    """Seconds running requests have to finish after SIGTERM or ^C."""
    drain_delay_s: float = Field(0.0, ge=0, le=3600)
    """Seconds after SIGTERM in which /ready says 503 and requests are answered as before, so that routers that ask it
    have turned away before any is refused. --drain-timeout-s begins behind them; ^C does not wait."""
    otel_traces: bool = False
    """Send a trace of each request by OTLP over HTTP, to where the standard OTEL_* variables say. Needs the extra
    `otel`."""
    kv_events: str | None = Field(None, examples=["tcp://127.0.0.1:5557", "tcp://*:5557", "ipc:///run/kv-events"])
    """ZeroMQ address on which the prefix cache's blocks are published as vLLM does, for routers: tcp://127.0.0.1:5557,
    or tcp://*:5557 for other machines. That of another machine is connected to. Whoever may read there reads prompts,
    as token ids. Needs the extra `events`."""
    kv_events_replay: str | None = Field(None, examples=["tcp://127.0.0.1:5558"])
    """ZeroMQ address at which readers of --kv-events ask for what they have missed."""
    kv_events_topic: str | None = Field(None, min_length=1)
    """What messages of --kv-events begin with; readers subscribe to it. llm-d's is kv@ADDRESS:PORT@MODEL."""

    @field_validator("kv_events", "kv_events_replay")
    @classmethod
    def _zeromq_address(cls, value: str | None) -> str | None:
        if value is not None and not _ZMQ.fullmatch(value):
            raise ValueError("is an address such as tcp://127.0.0.1:5557, tcp://*:5557 or ipc:///run/kv-events")
        return value

    @model_validator(mode="after")
    def _events_of_a_cache(self) -> Settings:
        if self.kv_events is None:
            if self.kv_events_replay is not None or self.kv_events_topic is not None:
                raise ValueError("--kv-events-replay and --kv-events-topic go with --kv-events, which is not given")
        elif not self.enable_prefix_caching:
            raise ValueError("--kv-events tells of the prefix cache, which is off; leave one of them out")
        elif self.kv_events == self.kv_events_replay:
            raise ValueError("--kv-events and --kv-events-replay are two sockets; give each an address of its own")
        return self

    @field_validator("api_key")
    @classmethod
    def _keys(cls, value: list[str]) -> list[str]:
        return _sendable(value)

    @field_validator("cors_origin")
    @classmethod
    def _origins(cls, value: list[str]) -> list[str]:
        for origin in value:
            if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin.lower()):
                raise ValueError(
                    "is an origin as browsers send it, such as https://example.com or http://localhost:3000"
                )
        return [origin.lower() for origin in value]

    @field_validator("allowed_host")
    @classmethod
    def _hosts(cls, value: list[str]) -> list[str]:
        for name in value:
            if name != "*" and not _NAME.fullmatch(name.lower()):
                raise ValueError(
                    "is a name as it stands in a URL, without a port: models.example.com, *.example.com, or * for any"
                )
        return [name.lower() for name in value]

    @model_validator(mode="after")
    def _exposure(self) -> Settings:
        loopback = self.host in ("localhost", "::1") or self.host.startswith("127.")
        if not loopback and not self.has_keys and not self.allow_unauthenticated:
            raise ValueError(
                f"host {self.host} is reachable from other machines: set --api-key KEY or --api-key-file FILE, or "
                "--allow-unauthenticated"
            )
        return self

    @property
    def has_keys(self) -> bool:
        """Whether requests need a key."""
        return bool(self.api_key) or self.api_key_file is not None


class ChatSettings(EngineSettings):
    """Chat with a GPTQ checkpoint in the terminal."""

    examples: ClassVar[tuple[str, ...]] = (
        "gptq-api chat /models/vicuna-7B-GPTQ",
        'gptq-api chat /models/vicuna-7B-GPTQ "Why is the sky blue?"',
        "gptq-api chat --url http://127.0.0.1:8000/v1",
        'gptq-api chat "What does this do?" --url http://127.0.0.1:8000/v1 <program.py',
    )
    seldom: ClassVar[frozenset[str]] = frozenset(
        [
            "block_size",
            "num_blocks",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_queued_requests",
            "log_json",
            "batch_invariant",
            "trace",
            "enable_prefix_caching",
            "engine_timeout_s",
            "log_level",
            "packed_cache",
            "gpu_memory_utilization",
            "lm_head_bits",
        ]
    )

    AT_URL: ClassVar[frozenset[str]] = frozenset(
        ("url", "api_key", "served_model_name", "system", "temperature", "top_p", "max_tokens", "seed", "config")
    ) | {"question", "history"}
    """what is left to say where a server has the model"""

    positional: ClassVar[tuple[str, ...]] = ("model_path", "question")

    question: str | None = Field(None, min_length=1)
    """Ask this, print the answer and leave; what is piped in stands behind it. A single argument is the question where
    it has a blank in it and is no path, or where --url has the model."""
    url: str | None = None
    """Talk to a running server (its /v1 address) instead of loading the model."""
    history: bool = True
    """Keep the lines that are typed for the next chat: gptq-api/chat_history in $XDG_STATE_HOME or ~/.local/state."""
    api_key: list[str] = Field([], repr=False)
    """Bearer token for the server at --url; of several, separated by commas, the first."""
    system: str | None = None
    """System prompt."""
    temperature: float = Field(0.7, ge=0, le=2)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest answer, tokens. Default: what the context leaves."""
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    """Seed of the sampler."""

    @field_validator("api_key")
    @classmethod
    def _keys(cls, value: list[str]) -> list[str]:
        return _sendable(value)

    @classmethod
    def rearranged(cls, leading: dict[str, Any], behind: set[str]) -> dict[str, Any]:
        word = leading.get("model_path")
        if word is None or {"question"} & (leading.keys() | behind):
            return leading
        at_url = "url" in behind and "/" not in word and word != "demo"
        is_question = at_url or (" " in word.strip() and not Path(word[:4096]).exists())
        return {"question": word} if is_question else leading

    def check_given(self, on_command_line: Mapping[str, str], anywhere: Mapping[str, str]) -> None:
        url = anywhere.get("url")
        for name, written in on_command_line.items():
            if url is not None and name not in self.AT_URL:
                raise ConfigError(
                    f"{written} does nothing beside {url}, whose server has its own; leave one of them out"
                )
            if url is None and name == "api_key":
                raise ConfigError(f"{written} does nothing without --url: the model is loaded here; leave it out")


class InspectSettings(ModelSettings):
    """Print what a checkpoint is, without loading its weights."""

    examples: ClassVar[tuple[str, ...]] = (
        "gptq-api inspect /models/vicuna-7B-GPTQ",
        "gptq-api inspect /models/vicuna-7B-GPTQ --device cuda --kv-cache-dtype fp8",
    )
    seldom: ClassVar[frozenset[str]] = frozenset(
        [
            "block_size",
            "num_blocks",
            "max_num_batched_tokens",
            "batch_invariant",
            "num_threads",
            "packed_cache",
            "lm_head_bits",
            "gpu_memory_utilization",
        ]
    )

    json_output: bool = Field(False, validation_alias=AliasChoices("json", "json_output"))
    """Print JSON."""


class QuantizeSettings(CommandSettings):
    """Make a GPTQ checkpoint of an FP16, BF16 or FP32 LLaMA. An interrupted run continues when it is started again."""

    positional: ClassVar[tuple[str, ...]] = ("model_path", "out")
    examples: ClassVar[tuple[str, ...]] = (
        "gptq-api quantize /models/vicuna-fp16 /models/vicuna-4bit --calibration chats.jsonl --act-order",
    )

    model_path: str = Field(min_length=1)
    """Folder of the model to quantize, or its name on the Hugging Face hub."""
    out: Path
    """Folder to write, which must not exist; work in progress is kept in OUT.partial."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub. Default: main."""
    gptq_ckpt: Path | None = None
    """The weights file, where the folder holds more than one."""

    # The format
    bits: Literal[2, 3, 4, 8] = 4
    """Bits per weight."""
    group_size: int = 128
    """Input channels that share a scale and a zero point; -1: all of them."""
    act_order: bool = False
    """Quantize the channels with the largest inputs first: mostly better, and served nearly as fast."""
    static_groups: bool = False
    """Fit the groups before quantizing, so that act-order leaves them sequential."""
    group_aware: bool | None = None
    """Without act-order: quantize the groups with the largest inputs first, at no cost when served. Default: with 2 and
    3 bits, where it helps."""
    sym: bool = True
    """Zero points in the middle of the range; --no-sym fits them."""
    damp_percent: float = Field(0.01, gt=0, le=1)
    """Share of the Hessian's mean diagonal that is added to it; raised where that is not enough."""
    nearest: bool = False
    """Round to nearest instead of GPTQ: no better than its name, for comparison."""
    format: Literal["gptq", "gptq_v2"] | None = None
    """How zero points are stored. Default: gptq (v1), which every program reads; with --no-sym gptq_v2, since GPTQModel
    refuses fitted zero points in v1."""

    # The text
    calibration: Path | None = None
    """Text file, or JSONL with `text` or `messages` in every line: what the model is going to be used for."""
    num_samples: int = Field(128, ge=1)
    """Samples of the calibration text."""
    sample_length: int | None = Field(None, ge=2)
    """Tokens per sample. Default: 2048, or the model's context where that is shorter."""
    eval_text: Path | None = None
    """Text or JSONL file on which perplexity is measured. Default: the end of the calibration text, held out."""
    num_eval_samples: int = Field(64, ge=1)
    """Samples of sample_length tokens that perplexity is measured on."""

    # The machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    num_threads: int | None = Field(None, ge=1, le=4096)
    """CPU threads. Default: the cores this process may use."""
    config: Path | None = None
    """TOML file with any of these settings."""

    @field_validator("group_size")
    @classmethod
    def _size(cls, value: int) -> int:
        return _group_size(value)

    @property
    def stored_format(self) -> Literal["gptq", "gptq_v2"]:
        return self.format or ("gptq" if self.sym else "gptq_v2")

    @property
    def leaves_groups_to_reorder(self) -> bool:
        return not self._without_reordering

    @property
    def _without_reordering(self) -> list[str]:
        given = {
            "--act-order": self.act_order,
            "--nearest": self.nearest,
            "--group-size -1": self.group_size < 0,
        }
        return [option for option, is_given in given.items() if is_given]

    def check_given(self, on_command_line: Mapping[str, str], anywhere: Mapping[str, str]) -> None:
        if self.calibration is None and not self.nearest:
            raise ConfigError("--calibration FILE is missing: a text, or JSONL, of what the model will be used for")
        if self.group_aware and (against := self._without_reordering):
            raise ConfigError(
                f"--group-aware does not go with {against[0]}, which leaves it nothing to do; leave one out"
            )


class RunBatchSettings(EngineSettings):
    """Answer the requests of a file, as OpenAI's batches have them: a line each with custom_id, method, url and body. A
    run that was stopped or killed goes on when it is started again."""

    positional: ClassVar[tuple[str, ...]] = ("requests", "out")
    examples: ClassVar[tuple[str, ...]] = (
        "gptq-api run-batch requests.jsonl answers.jsonl --model-path /models/vicuna-7B-GPTQ",
    )

    requests: Path
    """JSONL file of requests to /v1/chat/completions, /v1/completions, /v1/responses and /v1/messages."""
    out: Path
    """File to write, a line for each request, in their order; it must not exist. Work in progress is kept in
    OUT.partial."""
    model_alias: list[str] = []
    """Other names that requests may give the model, separated by commas; answers have its own."""
    accept_any_model: bool = False
    """Answer requests for any model, for files that have the name of another one."""
    strict_params: bool = False
    """Answer 400 to requests with unknown fields."""


class BenchSettings(CommandSettings):
    """Memory, perplexity and seconds per token of GPTQ checkpoints beside the unquantized model, on this machine."""

    positional: ClassVar[tuple[str, ...]] = ("models",)
    examples: ClassVar[tuple[str, ...]] = (
        "gptq-api bench /models/vicuna-4bit --fp16 /models/vicuna-fp16 --text wiki.txt --png bench.png",
    )

    models: list[str] = ["demo"]
    """Checkpoint folders or names on the Hugging Face hub. `demo` is the small model in the package."""
    revision: str | None = None
    """Branch, tag or commit of models on the hub. Default: main."""
    gptq_ckpt: Path | None = None
    """The weights file, where a checkpoint folder holds more than one."""
    fp16: Path | None = None
    """Folder of the unquantized model. Default: the first checkpoint's weights, dequantized."""
    synthetic: Literal["tinyllama-1.1b", "llama-7b", "llama-13b", "llama-3-8b", "llama-70b"] | None = None
    """Measure random weights of this shape instead of models: FP16, and 4 bits in groups of 128 and in one group. FP16
    is left out where the CPU's memory does not hold it."""
    text: Path | None = None
    """Text or JSONL file on which perplexity is measured."""
    context: int | None = Field(None, ge=2)
    """Tokens per window of the text. Default: 2048, or the model's context where that is shorter."""
    num_windows: int | None = Field(None, ge=1)
    """Windows of the text that are measured. Default: all."""
    prompt_tokens: int | None = Field(None, ge=1)
    """Tokens in the cache when timing begins. Default: 128, or a quarter of the context where that is less."""
    num_tokens: int | None = Field(None, ge=1)
    """Tokens decoded one by one; their median time is shown. Default: 128, or what the context leaves, and of random
    weights on the CPU 32."""
    batch: list[int] = Field([], examples=[[1, 8, 64]])
    """Sequences that get a token in one step, separated by commas. Default: of 1, 8 and 64 those whose cache takes no
    more than a quarter of the memory and that take no more than about a minute each; above 1B weights on the CPU 1
    and 8."""
    repeats: int = Field(3, ge=1, le=1000)
    """How often each is timed, with new sequences; the table shows the median and how far the repeats are apart."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the models run."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Activation type, and the type of the unquantized weights. auto is bfloat16 on the CPU."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """Type of the KV cache on CUDA, for all rows: what fp8 costs in perplexity."""
    num_threads: int | None = Field(None, ge=1, le=4096)
    """CPU threads, for all rows. Default: what the server takes for the first checkpoint."""
    json_file: Path | None = Field(None, validation_alias=AliasChoices("json", "json_file"))
    """Write the results to this JSON file."""
    png: Path | None = None
    """Write the table as a chart to this file; needs matplotlib."""
    config: Path | None = None
    """TOML file with any of these settings."""

    @field_validator("batch")
    @classmethod
    def _batches(cls, value: list[int]) -> list[int]:
        if not all(1 <= size <= 1024 for size in value):
            raise ValueError("is a list of whole numbers from 1 to 1024, such as 1,8,64")
        return value

    @field_validator("models")
    @classmethod
    def _models(cls, value: list[str]) -> list[str]:
        if not value:
            raise ValueError("names no model; leave it out for its default")
        return value

    def check_given(self, on_command_line: Mapping[str, str], anywhere: Mapping[str, str]) -> None:
        random = anywhere.get("synthetic")
        for name in ("models", "fp16", "gptq_ckpt", "revision", "text", "context", "num_windows"):
            if random is not None and name in on_command_line:
                what = f"{on_command_line[name]} does nothing beside {random}"
                raise ConfigError(f"{what}, which measures random weights; leave one of them out")


class BenchServeSettings(CommandSettings):
    """Load a running OpenAI server, ours or another's, and measure what its users feel: tokens a second, time to the
    first token, time between tokens. Closed loop: so many users, each with one request at a time. Open loop: requests
    arrive at a rate, whatever the server does."""

    positional: ClassVar[tuple[str, ...]] = ()
    examples: ClassVar[tuple[str, ...]] = (
        "gptq-api bench serve --url http://127.0.0.1:8000/v1",
        "gptq-api bench serve --url http://127.0.0.1:8000/v1 --concurrency 1,8,64 --json a.json --png a.png",
        "gptq-api bench serve --url http://127.0.0.1:8000/v1 --rate 2,8 --lengths fixed --prompt-tokens 512",
    )

    url: str = Field(min_length=1)
    """The server's /v1 address."""
    api_key: list[str] = Field([], repr=False)
    """Bearer token, where the server asks for one; of several, separated by commas, the first."""
    model: str | None = None
    """Name in requests. Default: the first that the server lists."""
    concurrency: list[int] = Field([], examples=[[1, 8, 64]])
    """Closed loop: numbers of users, separated by commas, a row for each. Default: 1,8,64; none where --rate is
    given."""
    rate: list[float] = Field([], examples=[[2.0, 8.5]])
    """Open loop: requests per second, separated by commas, a row for each."""
    num_requests: int | None = Field(None, ge=1, le=10**6)
    """Requests of a row. Default: 32, at least two for each user; 64 in open loop."""
    lengths: Literal["sharegpt", "fixed"] | None = None
    """Tokens of prompts and answers. sharegpt, the default, draws them log-normally with the means of ShareGPT (215 and
    198), as far as the server's context goes; fixed, the default where one of them is given, takes --prompt-tokens and
    --max-tokens."""
    prompt_tokens: int | None = Field(None, ge=1, le=10**6)
    """Tokens of a prompt with fixed lengths, about. Default: 128."""
    max_tokens: int | None = Field(None, ge=1, le=10**6)
    """Tokens of an answer with fixed lengths. Default: 128."""
    temperature: float = Field(0.0, ge=0, le=2)
    """Sampling temperature; 0 is greedy."""
    seed: int = Field(0, ge=0)
    """Of lengths and prompts: two servers get the same."""
    json_file: Path | None = Field(None, validation_alias=AliasChoices("json", "json_file"))
    """Write the results to this JSON file."""
    png: Path | None = None
    """Write a chart to this file; needs matplotlib."""
    config: Path | None = None
    """TOML file with any of these settings."""

    @field_validator("api_key")
    @classmethod
    def _keys(cls, value: list[str]) -> list[str]:
        return _sendable(value)

    @field_validator("concurrency")
    @classmethod
    def _users(cls, value: list[int]) -> list[int]:
        if not all(1 <= users <= 4096 for users in value):
            raise ValueError("is a list of whole numbers from 1 to 4096, such as 1,8,64")
        return value

    @field_validator("rate")
    @classmethod
    def _rates(cls, value: list[float]) -> list[float]:
        if not all(0 < rate <= 10**5 for rate in value):
            raise ValueError("is a list of numbers above 0, such as 2,8.5")
        return value

    def check_given(self, on_command_line: Mapping[str, str], anywhere: Mapping[str, str]) -> None:
        for name in ("prompt_tokens", "max_tokens"):
            if name in on_command_line and self.lengths == "sharegpt":
                given = on_command_line[name]
                raise ConfigError(f"{given} does nothing beside {anywhere['lengths']} sharegpt; leave one of them out")

    @property
    def chosen_lengths(self) -> Literal["sharegpt", "fixed"]:
        return self.lengths or ("sharegpt" if self.prompt_tokens is None and self.max_tokens is None else "fixed")


class VerifySettings(CommandSettings):
    """Compare this machine's logits and greedy tokens for a checkpoint with those of transformers' model of its
    dequantized weights, and say where they part."""

    examples: ClassVar[tuple[str, ...]] = ("gptq-api verify /models/vicuna-7B-GPTQ --device cuda",)

    # The model
    model_path: str = Field("demo", min_length=1)
    """Checkpoint folder, or a name on the Hugging Face hub. `demo` is the small model in the package."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub. Default: main."""
    gptq_ckpt: Path | None = None
    """The weights file, where the folder holds more than one."""
    text: Path | None = None
    """Text or JSONL file whose beginnings are compared. Default: three short texts in English."""
    prompt_tokens: int = Field(64, ge=2)
    """Tokens of each text, at most."""
    num_tokens: int = Field(32, ge=1)
    """Tokens decoded greedily behind each."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where both models run."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Activation type of ours, as served. transformers computes in float32 where memory holds that."""
    num_threads: int | None = Field(None, ge=1, le=4096)
    """CPU threads. Default: what the server takes."""
    json_output: bool = Field(False, validation_alias=AliasChoices("json", "json_output"))
    """Print JSON."""
    config: Path | None = None
    """TOML file with any of these settings."""


class PullSettings(CommandSettings):
    """Download a model of the Hugging Face hub: its configs, its tokenizer and one set of weights. What is there
    already is not fetched again; every command that takes a MODEL does the same by itself."""

    examples: ClassVar[tuple[str, ...]] = (
        "gptq-api pull TheBloke/vicuna-7B-1.1-GPTQ --revision gptq-4bit-128g-actorder_True",
    )

    model_path: str = Field(min_length=1)
    """Its name on the hub, OWNER/NAME."""
    revision: str | None = None
    """Branch, tag or commit. Default: main."""
    gptq_ckpt: Path | None = None
    """The weights file, where there are several."""
    config: Path | None = None
    """TOML file with any of these settings."""


class ListSettings(CommandSettings):
    """List the models of the Hugging Face hub that are on this machine."""

    positional: ClassVar[tuple[str, ...]] = ()
    examples: ClassVar[tuple[str, ...]] = ("gptq-api list",)

    json_output: bool = Field(False, validation_alias=AliasChoices("json", "json_output"))
    """Print JSON."""
    config: Path | None = None
    """TOML file with any of these settings."""


class RmSettings(CommandSettings):
    """Remove a model of the Hugging Face hub from this machine. It can be downloaded again."""

    examples: ClassVar[tuple[str, ...]] = ("gptq-api rm TheBloke/vicuna-7B-1.1-GPTQ",)

    model_path: str = Field(min_length=1)
    """Its name on the hub, OWNER/NAME."""
    revision: str | None = None
    """The branch, tag or commit to remove. Default: all that are here."""
    config: Path | None = None
    """TOML file with any of these settings."""


COMMANDS: dict[str, type[CommandSettings]] = {
    "serve": Settings,
    "chat": ChatSettings,
    "inspect": InspectSettings,
    "quantize": QuantizeSettings,
    "run-batch": RunBatchSettings,
    "bench": BenchSettings,
    "bench serve": BenchServeSettings,
    "verify": VerifySettings,
    "pull": PullSettings,
    "list": ListSettings,
    "rm": RmSettings,
}
ALL_SETTINGS = tuple(COMMANDS.values())


def takes_list(annotation: Any) -> bool:
    """Whether the setting is a list, or may be one."""
    return any(get_origin(kind) is list for kind in (annotation, *get_args(annotation)))


def _check_text(value: object) -> None:
    """Bytes of the command line and of variables that are not in its encoding come as halves of surrogate pairs."""
    if isinstance(value, list):
        for item in value:
            _check_text(item)
    if isinstance(value, str) and "\0" in value:
        raise ValueError("holds a NUL character, which no name has")
    if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
        encoding = sys.getfilesystemencoding().upper()
        remedy = "rename what it names" if encoding == "UTF-8" else "set PYTHONUTF8=1, or rename what it names"
        raise ValueError(f"holds bytes that are not {encoding}, as this process reads them; {remedy}")


def _path(value: object) -> object:
    """A path with its ~ replaced, which the shell does not do behind an equals sign, nor anybody in a file."""
    if isinstance(value, str) and any(len(part.encode()) > 255 for part in value.split("/")):
        raise ValueError("holds a name of more than 255 bytes, which no file has")
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    try:
        return str(Path(value).expanduser())
    except RuntimeError:
        raise ValueError(
            "begins with the home folder of somebody who is not known here; write the whole path"
        ) from None


def _items(value: object) -> object:
    """What a list holds; a TOML array says itself where its items end."""
    if isinstance(value, str) and value.lstrip().startswith('["'):
        raise ValueError("takes values separated by commas, and not JSON")
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list):
        return items
    items = [item.strip() if isinstance(item, str) else item for item in items]
    if "" in items:
        raise ValueError("holds an empty item")
    if any(isinstance(item, bool) for item in items):
        raise ValueError("holds true or false, which is none of its values; they are separated by commas")
    return items


def _chooses_number(annotation: Any) -> bool:
    kinds = [kind for kind in (annotation, *get_args(annotation)) if get_origin(kind) is Literal]
    return any(isinstance(choice, int) for kind in kinds for choice in get_args(kind))


def _number(value: object) -> object:
    """Literal[4] does not take the string that the environment and the command line give."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _sendable(keys: list[str]) -> list[str]:
    if not all(key.isascii() and key.isprintable() and not {" ", ","} & set(key) for key in keys):
        raise ValueError(
            "holds a key that no HTTP header carries as it is: a key is made of ASCII letters, digits and signs, "
            "without spaces and commas"
        )
    return keys


def _group_size(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError("is -1 (one group) or a positive number such as 128")
    return value


ALIASES = {"num_gpus": "tensor_parallel_size"}
"""other spellings of settings, in underscores: FastChat's"""


def flag(name: str) -> str:
    """`max_num_seqs` -> `--max-num-seqs`."""
    return "--" + {"json_output": "json", "json_file": "json"}.get(name, name).replace("_", "-")
