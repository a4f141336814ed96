"""`gptq-api COMMAND --help`: what a command takes, in groups, with an example."""

from __future__ import annotations

import shutil
import textwrap

from gptq_api.config import CommandSettings, flag, takes_list
from gptq_api.settings_words import option_lines

GROUPS: dict[str, tuple[str, ...]] = {
    "Model": (
        *(
            "requests",
            "model_path",
            "models",
            "out",
            "revision",
            "gptq_ckpt",
            "gptq_wbits",
            "gptq_groupsize",
            "gptq_act_order",
        ),
        *(
            "draft_model",
            "model",
            "served_model_name",
            "model_alias",
            "accept_any_model",
            "chat_template",
            "fp16",
            "synthetic",
        ),
        *("device", "tensor_parallel_size", "dtype", "num_threads"),
        *("lm_head_bits", "batch_invariant", "speculate", "packed_cache"),
    ),
    "Format": (
        *(
            "bits",
            "group_size",
            "act_order",
            "static_groups",
            "group_aware",
            "sym",
            "damp_percent",
            "nearest",
            "format",
        ),
    ),
    "Text": (
        *("calibration", "num_samples", "sample_length", "eval_text", "num_eval_samples"),
        *("text", "context", "num_windows"),
    ),
    "Answers": ("question", "system", "temperature", "top_p", "seed", "history"),
    "Load": (
        *("concurrency", "rate", "num_requests", "lengths", "prompt_tokens", "num_tokens", "max_tokens", "warm_up"),
        *("batch", "repeats"),
    ),
    "Memory": (
        *("max_model_len", "kv_cache_mib", "kv_cache_dtype", "gpu_memory_utilization", "block_size", "num_blocks"),
        *("enable_prefix_caching",),
    ),
    "Limits": (
        *("max_num_seqs", "max_num_batched_tokens", "max_queued_requests", "max_body_bytes", "strict_params"),
        *("header_timeout_s", "body_timeout_s", "send_timeout_s", "drain_timeout_s", "engine_timeout_s"),
        *("drain_delay_s",),
        *("on_engine_stall", "restart_engine", "timeout_s"),
        *("batch_dir", "batch_disk_mib", "batch_file_mib"),
    ),
    "Network": (
        *("url", "host", "port", "api_key", "api_key_file", "allow_unauthenticated", "allowed_host", "cors_origin"),
        *("sse_ping_s", "web_page", "kv_events", "kv_events_replay", "kv_events_topic"),
    ),
    "Log and files": (
        "log_level",
        "log_json",
        "trace",
        "otel_traces",
        "json_output",
        "json_file",
        "png",
        "yes",
        "config",
    ),
}
"""the groups of all commands in the order of the page; what is in none of them stands below, under More"""


def usage(cls: type[CommandSettings], prog: str) -> str:
    """`gptq-api quantize MODEL OUT [OPTIONS]`."""
    shown = []
    for name in cls.positional:
        word = argument(cls, name)
        shown.append(word if cls.model_fields[name].is_required() else f"[{word}]")
    return " ".join([prog, *shown, "[OPTIONS]"])


def argument(cls: type[CommandSettings], name: str) -> str:
    """What stands for a leading argument: MODEL, MODEL..."""
    word = name.removesuffix("_path").upper()
    return f"{word.removesuffix('S')}..." if takes_list(cls.model_fields[name].annotation) else word


def page(cls: type[CommandSettings], prog: str, everything: bool = False) -> str:
    """`everything`: also what is seldom said (`cls.seldom`)."""
    width = min(shutil.get_terminal_size().columns, 100)
    lines = [f"usage: {usage(cls, prog)}", "", *textwrap.wrap(" ".join((cls.__doc__ or "").split()), width), ""]
    for number, example in enumerate(cls.examples):
        parts = textwrap.wrap(example, width - 16, break_long_words=False, break_on_hyphens=False)
        lines.append(f"{'examples:' if number == 0 else '':10}" + f" \\\n{'':14}".join(parts))
    if cls.examples:
        lines.append("")
    hidden = frozenset() if everything else cls.seldom & cls.model_fields.keys()
    grouped = {name for names in GROUPS.values() for name in names}
    others = tuple(name for name in cls.model_fields if name not in grouped)
    for title, names in (*GROUPS.items(), ("More", others)):
        ours = [name for name in names if name in cls.model_fields and name not in hidden]
        if ours:
            lines.append(f"{title}:")
        for name in ours:
            spelled = flag(name)
            if name in cls.positional:
                spelled = f"{argument(cls, name)}, {spelled}"
            lines += option_lines(spelled, cls.model_fields[name], width)
        if ours:
            lines.append("")
    lines += ["  -h, --help", "      This page."]
    if hidden:
        lines += ["  --help-all", f"      This page and {len(hidden)} more options, which are seldom needed here."]
    return "\n".join(lines)
