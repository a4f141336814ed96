"""`gptq-api COMMAND [MODEL] [OPTIONS]`."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gptq_api import __version__, exits
from gptq_api.checkpoint.files import candidates
from gptq_api.cli.output import fail, prepare, with_output
from gptq_api.config import COMMANDS, ChatSettings, CommandSettings, ModelSettings, RunBatchSettings, Settings
from gptq_api.errors import ConfigError, UserError, printable
from gptq_api.hub import with_local_model
from gptq_api.logs import configure
from gptq_api.settings_source import load_settings
from gptq_api.text.folder import checkpoint_folder

_HELP = {
    "serve": "answer the OpenAI API from a GPTQ checkpoint",
    "chat": "chat with a GPTQ checkpoint in the terminal",
    "inspect": "say what a checkpoint is, without loading its weights",
    "quantize": "make a GPTQ checkpoint of an FP16 model",
    "run-batch": "answer the requests of a file, without a server",
    "bench": "memory, perplexity and speed of GPTQ checkpoints beside FP16",
    "bench serve": "load a running OpenAI server: tokens/s, time to the first token, between tokens",
    "verify": "compare a checkpoint's logits on this machine with transformers'",
    "pull": "download a model of the Hugging Face hub",
    "list": "the models of the hub that are here",
    "rm": "remove one of them",
}
"""One module gptq_api.cli.NAME (bench_serve for two words) with run(settings) -> exit status for each of COMMANDS."""


def usage() -> str:
    lines = [f"  {name:12} {help_text}" for name, help_text in _HELP.items()]
    return "\n".join(
        [
            "usage: gptq-api COMMAND [MODEL] [OPTIONS]",
            "",
            "MODEL is a GPTQ checkpoint folder or a name on the Hugging Face hub; without one, the demo model in the",
            "package. quantize takes MODEL OUT, bench any number of models, run-batch REQUESTS OUT.",
            "",
            *lines,
            "",
            "gptq-api COMMAND --help lists the options.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns one of `exits`; where it failed, a sentence on stderr says why."""
    prepare()
    args = list(sys.argv[1:] if argv is None else argv)
    return with_output(args[0] if args else "", lambda: _main(args))


def _main(args: list[str]) -> int:
    if not args:
        print(usage(), file=sys.stderr)
        return exits.WRONG_USE
    if args[0] in ("-h", "--help", "help"):
        print(usage())
        return exits.DONE
    if args[0] in ("-V", "--version", "version"):
        print(f"gptq-api {__version__}")
        return exits.DONE
    name, rest = args[0], args[1:]
    if rest and f"{name} {rest[0]}" in COMMANDS:
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name not in COMMANDS:
        print(f"gptq-api: {_not_a_command(name)}", file=sys.stderr)
        return exits.WRONG_USE
    try:
        settings = load_settings(COMMANDS[name], rest, prog=f"gptq-api {name}")
    except ConfigError as error:
        fail(name, error)
        return exits.WRONG_USE
    if isinstance(settings, (Settings, RunBatchSettings)):
        configure(settings.log_level, settings.log_json)
    stopped = "stopped; the same command goes on with what is missing"
    try:
        if isinstance(settings, ModelSettings) and not (isinstance(settings, ChatSettings) and settings.url):
            settings = with_local_model(settings)
            refuse_without_weights(settings)
        stopped = "stopped"
        module = name.replace(" ", "_").replace("-", "_")
        run: Callable[[CommandSettings], int] = importlib.import_module(f"gptq_api.cli.{module}").run
        return run(settings)
    except UserError as error:
        fail(name, error)
        return error.exit_status
    except KeyboardInterrupt:
        if sys.stderr.isatty():  # behind its ^C
            print(file=sys.stderr)
        fail(name, stopped)
        return exits.INTERRUPTED


def refuse_without_weights(settings: ModelSettings) -> None:
    """CheckpointError for a path that holds no weights, before anything else in it is looked at."""
    demo = settings.model_path == "demo"
    candidates(checkpoint_folder("demo") if demo else Path(settings.model_path), settings.gptq_ckpt)


def _not_a_command(name: str) -> str:
    """A sentence: the command that was meant, or those there are."""
    close = difflib.get_close_matches(name.lower(), [*COMMANDS, "help", "version"], 1)
    shown = printable(name[:80])
    if close:
        return f"{shown} is not a command; did you mean gptq-api {close[0]}?"
    if name.startswith("-"):
        return f"{shown} comes before the command; options stand behind it, as in gptq-api serve {shown}"
    return f"{shown} is not a command: {', '.join(COMMANDS)} are; gptq-api --help says what they do"
