"""Every value that a setting may not have, from every source, in a sentence of ours."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic.fields import FieldInfo

from gptq_api.cli.main import main
from gptq_api.config import (
    ALL_SETTINGS,
    COMMANDS,
    ENV_PREFIX,
    BenchSettings,
    ChatSettings,
    CommandSettings,
    InspectSettings,
    QuantizeSettings,
    Settings,
    flag,
)
from gptq_api.errors import ConfigError
from gptq_api.settings_source import load_settings
from gptq_api.settings_words import taken
from tests.test_config import GOES_WITH

PYDANTICS = re.compile(
    r"[Ii]nput|should|unable to|valid (string|integer|number|boolean)|parse|finite|errors\.pydantic|type="
)
"""words of the library's sentences"""
EVERY_SETTING = [(kind, name) for kind in ALL_SETTINGS for name in kind.model_fields if name != "config"]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith(ENV_PREFIX):
            monkeypatch.delenv(name)


def kind_of(field: FieldInfo) -> Any:
    if get_origin(field.annotation) in (Literal, list):
        return field.annotation
    (kind,) = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not type(None)]
    return kind


def wrong_texts(field: FieldInfo) -> list[str]:
    """What a flag or a variable may say and the setting does not take."""
    kind = kind_of(field)
    if kind in (int, float):
        texts = [
            "abc",
            "1.5.2",
            "",
            " ",
            "nan",
            "inf",
            "-inf",
            "None",
            "١²",
            "1,000",
            "0x10",
            "9" * 5000,
            "-" + "9" * 400,
        ]
        texts += ["1.5", "1e3"] if kind is int else []
        bounds = field.metadata
        texts += [str(bound.ge - 1) for bound in bounds if hasattr(bound, "ge")]
        texts += [str(bound.gt) for bound in bounds if hasattr(bound, "gt")]
        texts += [str(bound.le + 1) for bound in bounds if hasattr(bound, "le")]
        return texts
    if kind is bool:
        return ["maybe", "", "2", "None", "tru"]
    if get_origin(kind) is Literal:
        return ["nonsense", "", " ", "5", "4.0", "AUTO", "None"]
    if get_origin(kind) is list:
        return ["", "a,,b", " ", '["a"]', "a,"]
    return ["", "nul\0", "half \udcff"] if kind is Path or field.metadata else ["nul\0", "half \udcff"]


def wrong_values(field: FieldInfo) -> list[str]:
    """What a TOML file may say besides."""
    kind = kind_of(field)
    values = ["{a = 1}", "2026-11-29", "[[]]", "[true]"]
    values += ["[1, 2]"] if kind not in (list[int], list[float]) else ['["x"]']
    values += ["true", "1979-05-27T07:32:00Z"] if kind not in (bool,) else ["3.5", "7"]
    values += ["nan", "inf", "1e400"] if kind is not str else []
    return values + (["7", "0.5"] if kind in (str, Path) else [])


@pytest.mark.parametrize(
    ("kind", "name"), EVERY_SETTING, ids=lambda item: item if isinstance(item, str) else item.__name__
)
def test_a_value_that_cannot_be_is_told_in_our_words(
    kind: type[CommandSettings], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    field, file = kind.model_fields[name], tmp_path / "gptq.toml"
    needed = {other for other, of in kind.model_fields.items() if of.is_required()} | GOES_WITH.get((kind, name), set())
    examples = {other: kind.model_fields[other].examples or ["x"] for other in needed}
    others = [item for other in sorted(needed - {name}) for item in (flag(other), examples[other][0])]

    def refused(source: str, args: list[str], value: str) -> None:
        with pytest.raises(ConfigError) as refusal:
            load_settings(kind, [*others, *args])
        told = str(refusal.value)
        assert told.startswith(source + (":" if " takes no value" not in told else " ")), told
        assert "\n" not in told and len(told) < 600, told
        assert not PYDANTICS.search(told.replace(source, "").replace(value, "")), told
        if field.repr and value.strip() and len(value) < 20 and not value.startswith(("[", "{", "nul", "half")):
            assert value.strip('"') in told or value.lower() in told or "comma" in told or "empty" in told, told
        elif not field.repr:
            assert not value.strip() or value not in told, told

    spelled, variable = flag(name), ENV_PREFIX + name.upper()
    for text in wrong_texts(field):
        refused(spelled, [f"{spelled}={text}"], text)
        if "\0" not in text:
            with monkeypatch.context() as patch:
                patch.setenv(variable, text)
                refused(f"environment variable {variable}", [], text)
        if text.isascii() and text.isprintable() and '"' not in text:
            file.write_text(f'{name} = "{text}"\n')
            refused(f"key {name} in {file}", ["--config", str(file)], text)
    for text in wrong_values(field):
        file.write_text(f"{name} = {text}\n")
        refused(f"key {name} in {file}", ["--config", str(file)], "")


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        (Settings, "port", "a whole number from 0 to 65535"),
        (Settings, "max_model_len", "a whole number from 1 to 16,777,216"),
        (Settings, "max_body_bytes", "a whole number of at least 1024"),
        (Settings, "gpu_memory_utilization", "a number above 0 and of at most 1"),
        (Settings, "drain_timeout_s", "a number of at least 0"),
        (Settings, "gptq_wbits", "2, 3, 4 or 8"),
        (Settings, "dtype", "auto, float32, bfloat16 or float16"),
        (Settings, "log_json", "true or false"),
        (Settings, "gptq_act_order", "true or false"),
        (Settings, "gptq_groupsize", "a whole number"),
        (Settings, "trace", "a path"),
        (Settings, "host", "a text that is not empty"),
        (Settings, "cors_origin", "values separated by commas"),
        (ChatSettings, "temperature", "a number from 0 to 2"),
    ],
)
def test_what_a_setting_takes(kind: type[CommandSettings], name: str, words: str) -> None:
    assert taken(kind.model_fields[name]) == words


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("serve --port", "--port lacks its value: it takes a whole number from 0 to 65535"),
        ("serve --port --host", "--port lacks its value (--port=--host, where that is the value)"),
        ("serve --port abc", "--port: takes a whole number from 0 to 65535, not 'abc'; left out, it is 8000"),
        ("serve --log-json yes", "--log-json takes no value; leave 'yes' out"),
        ("serve --no-log-json=yes", "--no-log-json takes no value; leave '=yes' out"),
        ("serve --log-json --nonsense", "--nonsense is not an option of gptq-api serve; gptq-api serve --help lists"),
        ("serve -x", "-x is not an option of gptq-api serve; gptq-api serve --help lists them"),
        ("serve --port 1 demo", "'demo' is not expected there: gptq-api serve [MODEL] [OPTIONS]"),
        ("inspect a b", "'b' is not expected there: gptq-api inspect [MODEL] [OPTIONS]"),
        ("quantize a b c", "'c' is not expected there: gptq-api quantize MODEL OUT [OPTIONS]"),
        ("bench --json", "--json lacks its value: it takes a path"),
        ("bench --json x a", "'a' is not expected there: gptq-api bench [MODEL...] [OPTIONS]"),
        ("serve --", "'--' is not expected there"),
        ("serve a --model-path b", "'a' and --model-path 'b' are the same setting; keep one of them"),
        ("inspect --port 1", "--port is not an option of gptq-api inspect; gptq-api serve has it"),
        (
            "inspect --no-strict-params",
            "--no-strict-params is not an option of gptq-api inspect; gptq-api serve and run-batch have it",
        ),
        (
            "serve --temperature 1",
            "--temperature is not an option of gptq-api serve; gptq-api chat and bench serve have it",
        ),
        (
            "quantize a b --served-model-name x",
            "--served-model-name is not an option of gptq-api quantize; gptq-api serve, chat and run-batch",
        ),
        (
            "bench --gptq-wbits 4",
            "--gptq-wbits is not an option of gptq-api bench; gptq-api serve, chat, inspect and run-batch have",
        ),
        ("serve --no-port", "--no-port is not an option of gptq-api serve; did you mean --port?"),
        (
            "serve --model-path ~nobody-of-this-name/x",
            "--model-path: begins with the home folder of somebody who is not",
        ),
        ("chat --api-key x", "--api-key does nothing without --url: the model is loaded here; leave it out"),
    ],
)
def test_command_lines_that_cannot_be(command: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"gptq-api {command.split()[0]}: {words}"), err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("serv", "serv is not a command; did you mean gptq-api serve?"),
        ("Inspect", "Inspect is not a command; did you mean gptq-api inspect?"),
        ("quantise", "quantise is not a command; did you mean gptq-api quantize?"),
        ("--port", "--port comes before the command; options stand behind it, as in gptq-api serve --port"),
        ("sing", f"sing is not a command: {', '.join(COMMANDS)} are; gptq-api --help says what they do"),
        ("\x1b[31m", r"\x1b[31m is not a command"),
    ],
)
def test_commands_that_are_none(name: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"gptq-api: {words}") and err.count("\n") == 1


@pytest.mark.parametrize("name", sorted(set(ChatSettings.model_fields) - ChatSettings.AT_URL))
def test_beside_a_server_what_is_for_the_model_here_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_config import as_flags, sample

    flags = as_flags(name, sample(ChatSettings.model_fields[name]))
    given = flags[0].partition("=")[0]
    with pytest.raises(ConfigError, match=f"^{given} does nothing beside --url, whose server has its own; leave one"):
        load_settings(ChatSettings, ["--url", "http://x", *flags])
    monkeypatch.setenv("GPTQ_API_URL", "http://x")
    with pytest.raises(ConfigError, match=f"^{given} does nothing beside environment variable GPTQ_API_URL, "):
        load_settings(ChatSettings, flags)
    for kept in sorted(ChatSettings.AT_URL - {"url", "config"}):
        load_settings(ChatSettings, as_flags(kept, sample(ChatSettings.model_fields[kept])))


def test_keys_and_variables_of_other_commands_are_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "gptq.toml"
    file.write_text('port = 9000\nbits = 3\nurl = "http://x"\n')
    monkeypatch.setenv("GPTQ_API_STRICT_PARAMS", "nonsense")
    load_settings(InspectSettings, ["--config", str(file)])
    assert load_settings(QuantizeSettings, ["a", "b", "--nearest", "--config", str(file)]).bits == 3


def test_a_home_folder_is_meant_in_every_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GPTQ_API_TRACE", "~/trace")
    settings = load_settings(Settings, ["--model-path=~/m"])
    assert (settings.model_path, settings.trace) == (f"{tmp_path}/m", tmp_path / "trace")
    assert load_settings(BenchSettings, ["~/a", "b"]).models == [f"{tmp_path}/a", "b"]


def test_commands_and_their_settings_are_the_same_list() -> None:
    from gptq_api.cli.main import _HELP

    assert list(_HELP) == list(COMMANDS) and set(COMMANDS.values()) == set(ALL_SETTINGS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_for_people(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"]) == main([command, "nonsense", "-h"]) == 0
    out = capsys.readouterr().out
    assert not re.search(r"default: None|list\[|\bstr\b|\bint\b|\[\]|\bTrue|\bFalse", out)
    assert max(map(len, out.splitlines())) <= 80
    for name in COMMANDS[command].model_fields:
        shown = f"  {flag(name)}" in out or f", {flag(name)}" in out
        assert shown != (name in COMMANDS[command].seldom), name


def test_help_says_what_a_setting_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "--port N Port to listen on; 0 picks a free one and prints it. (from 0 to 65535; default: 8000)" in out
    assert "--device auto|cpu|cuda Where the model runs. (default: auto)" in out
    assert "--log-json, --no-log-json One JSON object per log line. (default: false)" in out
