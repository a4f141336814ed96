"""Every knob once: the same name as flag, variable and TOML key; anything else refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from gptq_api.cli.main import main
from gptq_api.config import (
    ALL_SETTINGS,
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
from gptq_api.settings_help import GROUPS
from gptq_api.settings_source import load_settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith(ENV_PREFIX):
            monkeypatch.delenv(name)


def test_command_line_beats_environment_beats_file_beats_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "gptq.toml"
    file.write_text("port = 1\nmax_num_seqs = 2\nblock_size = 4\n")
    monkeypatch.setenv("GPTQ_API_MAX_NUM_SEQS", "3")
    monkeypatch.setenv("GPTQ_API_PORT", "5")
    settings = load_settings(Settings, ["--config", str(file), "--port", "7"])
    assert (settings.port, settings.max_num_seqs, settings.block_size) == (7, 3, 4)
    assert settings.max_queued_requests == 512


def test_the_past_flags() -> None:
    args = [
        "--model-path",
        "m",
        "--gptq-wbits",
        "4",
        "--gptq-groupsize",
        "128",
        "--gptq-ckpt",
        "f.pt",
        "--gptq-act-order",
    ]
    settings = load_settings(Settings, args)
    assert (settings.gptq_wbits, settings.gptq_groupsize, settings.gptq_act_order) == (4, 128, True)
    assert settings.gptq_ckpt == Path("f.pt")
    assert load_settings(Settings, ["--no-gptq-act-order"]).gptq_act_order is False
    assert load_settings(Settings, []).gptq_act_order is None


def test_a_leading_positional_argument_is_the_model() -> None:
    assert load_settings(InspectSettings, ["folder", "--json"]).json_output is True
    assert load_settings(ChatSettings, ["folder", "--temperature", "0"]).model_path == "folder"


def test_more_positional_arguments() -> None:
    text = ["--calibration", "t.txt"]
    quantize = load_settings(QuantizeSettings, ["model", "out", "--bits", "3", "--act-order", "--no-sym", *text])
    assert (quantize.model_path, quantize.out, quantize.bits) == ("model", Path("out"), 3)
    assert quantize.act_order and not quantize.sym
    assert load_settings(QuantizeSettings, ["model", "--out", "there", *text]).out == Path("there")
    bench = load_settings(BenchSettings, ["a", "b", "c", "--json", "x.json", "--fp16", "f"])
    assert (bench.models, bench.json_file, bench.fp16) == (["a", "b", "c"], Path("x.json"), Path("f"))
    assert load_settings(BenchSettings, []).models == ["demo"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["model"], "--out is missing: gptq-api quantize MODEL OUT [OPTIONS]"),
        (["model", "out", "third"], "third"),
        (["model", "out", "--bits", "5"], "--bits"),
        (["model", "out", "--group-size", "0"], "--group-size: is -1"),
        (["model", "out", "--damp-percent", "0"], "--damp-percent"),
        (["model", "out", "--act-ordr"], "did you mean --act-order"),
        (["model", "out", "--port", "1"], "--port is not an option of gptq-api quantize; gptq-api serve has it"),
        (["model", "out"], "--calibration FILE is missing"),
        (["model", "out", "--nearest", "--group-aware"], "--group-aware does not go with --nearest"),
        (["model", "out", "--calibration", "x", "--group-aware", "--act-order"], "does not go with --act-order"),
        (["model", "out", "--calibration", "x", "--group-aware", "--group-size", "-1"], "with --group-size -1"),
    ],
)
def test_wrong_arguments_of_quantize_are_named(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", *args]) == 2
    printed = capsys.readouterr().err
    assert words in printed and len(printed.strip().splitlines()) == 1


@pytest.mark.parametrize("kind", ALL_SETTINGS)
def test_help_is_in_groups_and_leaves_nothing_out(
    kind: type[CommandSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    pages = []
    for asked in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            load_settings(kind, [asked], prog="gptq-api it")
        pages.append(capsys.readouterr().out)
    short, whole = pages
    for name in kind.model_fields:
        line = re.compile(rf"^  (\S+, )?{flag(name)}\b", re.MULTILINE)
        assert line.search(whole) and bool(line.search(short)) != (name in kind.seldom), name
    joined = " ".join(short.replace("\\\n", "").split())
    assert kind.examples and all(" ".join(example.split()) in joined for example in kind.examples)
    assert "MODEL" in short.splitlines()[0] or "model_path" not in kind.positional
    assert [title for title in GROUPS if f"\n{title}:\n" in whole]


def test_no_setting_is_in_two_groups() -> None:
    names = [name for group in GROUPS.values() for name in group]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("kind", [QuantizeSettings, BenchSettings])
def test_every_knob_of_the_tools_has_help(kind: type[CommandSettings]) -> None:
    for name, field in kind.model_fields.items():
        assert field.description and field.description.endswith("."), name


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_every_knob_has_help_and_a_variable(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    field = Settings.model_fields[name]
    assert field.description and field.description.endswith(".")
    with pytest.raises(SystemExit) as stop:
        load_settings(Settings, ["--help"])
    assert stop.value.code == 0
    assert flag(name) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--prt", "9"], ["--prt", "did you mean --port"]),
        (["--port", "abc"], ["--port", "abc"]),
        (["--port", "99999"], ["--port", "65535", "99999"]),
        (["--gptq-wbits", "5"], ["--gptq-wbits", "2, 3, 4 or 8", "5"]),
        (["--gptq-groupsize", "0"], ["--gptq-groupsize", "-1"]),
        (["--dtype", "int8"], ["--dtype", "bfloat16"]),
        (["--host", "0.0.0.0"], ["0.0.0.0", "--api-key", "--allow-unauthenticated"]),
        (["--config", "/nowhere/x.toml"], ["/nowhere/x.toml"]),
        (["a", "b"], ["b"]),
    ],
)
def test_wrong_arguments_are_named(args: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *args]) == 2
    printed = capsys.readouterr().err
    for word in words:
        assert word in printed
    assert "Traceback" not in printed and len(printed.strip().splitlines()) == 1


def test_unknown_variables_and_keys_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "gptq.toml"
    file.write_text("max_num_sequences = 2\n")
    with pytest.raises(
        ConfigError, match=r"max_num_sequences in .*gptq.toml is not a setting; did you mean max_num_seqs"
    ):
        load_settings(Settings, ["--config", str(file)])
    monkeypatch.setenv("GPTQ_API_PROT", "1")
    with pytest.raises(ConfigError, match="GPTQ_API_PROT is not a setting; did you mean GPTQ_API_PORT"):
        load_settings(Settings, [])
    monkeypatch.delenv("GPTQ_API_PROT")
    monkeypatch.setenv("GPTQ_API_BLOCK_SIZE", "-4")
    with pytest.raises(ConfigError, match="environment variable GPTQ_API_BLOCK_SIZE"):
        load_settings(Settings, [])


NUMBERS = (7, 0.5, 7000)
"""one of them is allowed wherever a number is"""


def sample(field: FieldInfo) -> Any:
    """A value of the field's type as TOML writes it, other than the default. Fails for a type that is new here."""
    if field.examples:
        return field.examples[0]
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not type(None)]
    if get_origin(field.annotation) in (Literal, list):
        kinds = [field.annotation]
    (kind,) = kinds
    if get_origin(kind) is Literal:
        return get_args(kind)[-1]
    if get_origin(kind) is list:
        assert get_args(kind) == (str,)
        return ["one", "two"]
    if kind is bool:
        return not field.default
    if kind in (int, float):
        return next(number for number in NUMBERS if fits(field, number))
    assert kind in (str, Path), f"{kind} has no sample"
    return "localhost"


def fits(field: FieldInfo, number: float) -> bool:
    try:
        kind: Any = Annotated[field.annotation, field.description, *field.metadata]
        TypeAdapter(kind).validate_python(number)
    except ValidationError:
        return False
    return bool(number != field.default)


GOES_WITH: dict[tuple[type[CommandSettings], str], set[str]] = (
    {(ChatSettings, "api_key"): {"url"}}
    | {(QuantizeSettings, name): {"calibration"} for name in QuantizeSettings.model_fields}
    | {(Settings, name): {"kv_events"} for name in ("kv_events_replay", "kv_events_topic")}
)
"""settings without which another one is refused"""


def as_flags(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag(name) if value else "--no-" + flag(name)[2:]]
    return [f"{flag(name)}={','.join(map(str, value)) if isinstance(value, list) else value}"]


def as_text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in ALL_SETTINGS for name in kind.model_fields if name != "config"],
    ids=lambda item: item if isinstance(item, str) else item.__name__,
)
def test_every_setting_of_every_command_reads_the_same_from_all_sources(
    kind: type[CommandSettings], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`config` names one of the sources, and is not read from itself."""
    fields = kind.model_fields
    value = sample(fields[name])
    needed = {other for other in fields if fields[other].is_required()} | GOES_WITH.get((kind, name), set())
    others = [item for other in sorted(needed - {name}) for item in (flag(other), (fields[other].examples or ["x"])[0])]
    read = {"flag": load_settings(kind, [*others, *as_flags(name, value)])}
    flag_name = flag(name)[2:]
    for spelling in {name, name.replace("_", "-"), flag_name}:
        for text in {json.dumps(value), json.dumps(as_text(value))}:
            file = tmp_path / "gptq.toml"
            file.write_text(f"{spelling} = {text}\n")
            read[f"TOML {spelling} = {text}"] = load_settings(kind, [*others, "--config", str(file)])
    for spelling in {name, flag_name.replace("-", "_")}:
        with monkeypatch.context() as patch:
            patch.setenv(ENV_PREFIX + spelling.upper(), as_text(value))
            read[f"variable {spelling.upper()}"] = load_settings(kind, others)
    expected = Path(value) if isinstance(getattr(read["flag"], name), Path) else value
    assert len(read) >= 3
    for source, settings in read.items():
        assert getattr(settings, name) == expected, source
        assert settings.model_dump(exclude={"config"}) == read["flag"].model_dump(exclude={"config"}), source
    assert expected != fields[name].default


@pytest.mark.parametrize(
    ("kind", "name"), [(Settings, "api_key"), (ChatSettings, "api_key"), (BenchSettings, "models")]
)
def test_lists_are_split_at_commas(
    kind: type[CommandSettings], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    needed = [] if kind is not ChatSettings else ["--url", "x"]

    def read(*args: str) -> Any:
        return getattr(load_settings(kind, [*needed, *args]), name)

    assert read(flag(name), "a") == ["a"]
    assert read(flag(name), "a", flag(name), " b , c") == read(f"{flag(name)}=a,b,c") == ["a", "b", "c"]
    file = tmp_path / "gptq.toml"
    for text in ('"a , b"', '["a", " b "]'):
        file.write_text(f"{name} = {text}\n")
        assert read("--config", str(file)) == ["a", "b"]
    variable = ENV_PREFIX + name.upper()
    for text in ("a,b", " a, b\n"):
        monkeypatch.setenv(variable, text)
        assert read() == ["a", "b"]
    for text in ("", " ", "a,", ",a", "a,,b", "a, ,b"):
        monkeypatch.setenv(variable, text)
        with pytest.raises(ConfigError, match=f"environment variable {variable}: holds an empty item"):
            read()
    monkeypatch.setenv(variable, '["a", "b"]')
    with pytest.raises(ConfigError, match=f"environment variable {variable}: takes values separated by commas"):
        read()
    monkeypatch.delenv(variable)
    file.write_text(f'{name} = ["a", ""]\n')
    with pytest.raises(ConfigError, match=rf"key {name} in .*gptq.toml: holds an empty item"):
        read("--config", str(file))
    with pytest.raises(ConfigError, match=f"^{flag(name)}: holds an empty item"):
        read(flag(name), "a", flag(name), "")


@pytest.mark.parametrize("key", ["geh\u00e4im", "two words", "tab\tin", "line\nbreak", "nul\0", "\u2019"])
def test_a_key_that_no_header_carries_is_refused_and_not_shown(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--api-key: holds a key that no HTTP header carries as it is") as refusal:
        load_settings(Settings, ["--api-key", f"good,{key}"])
    assert "good" not in str(refusal.value) and key not in str(refusal.value)
    file = tmp_path / "gptq.toml"
    file.write_text('api-key = ["one,key"]\n')
    with pytest.raises(ConfigError, match=r"key api-key in .*gptq.toml: holds a key that no HTTP header"):
        load_settings(Settings, ["--config", str(file)])
    assert "good" not in repr(load_settings(Settings, ["--api-key", "good"]))


def test_two_spellings_of_one_setting_in_one_source_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "gptq.toml"
    for kind, text, first, second in (
        (Settings, "max-num-seqs = 4\nmax_num_seqs = 4\n", "max-num-seqs", "max_num_seqs"),
        (InspectSettings, "json_output = true\njson = true\n", "json_output", "json"),
        (BenchSettings, 'json = "x"\njson-file = "x"\n', "json", "json-file"),
    ):
        file.write_text(text)
        args = ["--config", str(file)]
        with pytest.raises(ConfigError, match=rf"key {first} in .* and key {second} in .* are the same setting"):
            load_settings(kind, args)
    monkeypatch.setenv("GPTQ_API_JSON", "1")
    monkeypatch.setenv("GPTQ_API_JSON_OUTPUT", "1")
    with pytest.raises(ConfigError, match="GPTQ_API_JSON and environment variable GPTQ_API_JSON_OUTPUT are the same"):
        load_settings(InspectSettings, [])


def test_wrong_keys_of_a_file_are_named_as_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "gptq.toml"
    for text, words in (
        (
            "max-num-seqs = 0\n",
            r"^key max-num-seqs in .*gptq.toml: takes a whole number from 1 to 4096, not 0; left out, it is 256$",
        ),
        ("max-num-sequences = 2\n", r"^key max-num-sequences in .* is not a setting; did you mean max-num-seqs\?"),
        ("[server]\nport = 1\n", r"^key server in .* is not a setting"),
        ('config = "other.toml"\n', r"^key config in .*: a settings file does not name another one"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=words):
            load_settings(Settings, ["--config", str(file)])


@pytest.mark.parametrize(
    "name", [name for name, field in Settings.model_fields.items() if str not in get_args(field.annotation)]
)
def test_an_empty_variable_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = ENV_PREFIX + name.upper()
    monkeypatch.setenv(variable, "")
    with pytest.raises(ConfigError, match=f"^environment variable {variable}: ") as refusal:
        load_settings(Settings, [])
    assert any(words in str(refusal.value) for words in ("is empty", "holds an empty item", "not empty"))


def test_variables_without_our_prefix_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSON", "true")
    assert load_settings(InspectSettings, []).json_output is False
    monkeypatch.setenv("GPTQ_API_PORT", "1")
    assert Settings().port == 8000, "settings made by hand, as in the engine process, are what they are given"


def test_the_variable_of_the_build_is_not_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTQ_API_CUDA", "off")
    assert load_settings(Settings, []).port == 8000


def test_reachable_addresses_need_a_key_or_a_decision() -> None:
    assert load_settings(Settings, ["--host", "0.0.0.0", "--api-key", "k1,k2"]).api_key == ["k1", "k2"]
    assert load_settings(Settings, ["--host", "::", "--allow-unauthenticated"]).host == "::"


def test_the_engine_gets_the_same_settings_through_the_socket() -> None:
    settings = load_settings(ChatSettings, ["m", "--block-size", "8", "--gptq-ckpt", "x.pt", "--temperature", "0.1"])
    sent = settings.model_dump(mode="json", include=set(Settings.model_fields))
    again = Settings(**sent)
    assert again.model_dump() == Settings.model_validate(sent).model_dump()
    assert again.block_size == 8 and again.gptq_ckpt == Path("x.pt")


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sing"]) == 2
    assert "sing is not a command" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0
