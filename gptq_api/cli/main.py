"""`gptq-api COMMAND [MODEL] [OPTIONS]`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from gptq_api import __version__
from gptq_api.config import (
    BenchSettings,
    ChatSettings,
    CommandSettings,
    ConfigError,
    InspectSettings,
    QuantizeSettings,
    Settings,
)
from gptq_api.errors import UserError
from gptq_api.hub import with_local_model
from gptq_api.settings_source import load_settings

COMMANDS: dict[str, tuple[type[CommandSettings], str]] = {
    "serve": (Settings, "answer the OpenAI API from a GPTQ checkpoint"),
    "chat": (ChatSettings, "chat with a GPTQ checkpoint in the terminal"),
    "inspect": (InspectSettings, "say what a checkpoint is, without loading its weights"),
    "quantize": (QuantizeSettings, "make a GPTQ checkpoint of an FP16 model"),
    "bench": (BenchSettings, "memory, perplexity and speed of GPTQ checkpoints beside FP16"),
}
"""One module gptq_api.cli.NAME with run(settings) -> exit status for each."""


def usage() -> str:
    lines = [f"  {name:8} {help_text}" for name, (_, help_text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: gptq-api COMMAND [MODEL] [OPTIONS]",
            "",
            "MODEL is a GPTQ checkpoint folder or a name on the Hugging Face hub; without one, the demo model in the",
            "package. quantize takes MODEL OUT, bench any number of models.",
            "",
            *lines,
            "",
            "gptq-api COMMAND --help lists the options.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit status: 0 well, 1 it failed (a sentence on stderr), 2 it was asked for wrongly."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else 2
    if args[0] in ("-V", "--version", "version"):
        print(f"gptq-api {__version__}")
        return 0
    name = args[0]
    if name not in COMMANDS:
        print(f"gptq-api: {name} is not a command\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        settings = load_settings(COMMANDS[name][0], args[1:], prog=f"gptq-api {name}")
    except ConfigError as error:
        print(f"gptq-api {name}: {error}", file=sys.stderr)
        return 2
    try:
        if isinstance(settings, Settings) and not (isinstance(settings, ChatSettings) and settings.url):
            settings = with_local_model(settings)
    except UserError as error:
        print(f"gptq-api {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ngptq-api {name}: stopped; the same command goes on with what is missing", file=sys.stderr)
        return 130
    run: Callable[[CommandSettings], int] = importlib.import_module(f"gptq_api.cli.{name}").run
    return run(settings)
