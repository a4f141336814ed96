"""Every knob once: the same name as flag, variable and TOML key; anything else refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptq_api.cli.main import main
from gptq_api.config import (
    ENV_PREFIX,
    BenchSettings,
    ChatSettings,
    CommandSettings,
    ConfigError,
    InspectSettings,
    QuantizeSettings,
    Settings,
    flag,
)
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
    quantize = load_settings(QuantizeSettings, ["model", "out", "--bits", "3", "--act-order", "--no-sym"])
    assert (quantize.model_path, quantize.out, quantize.bits) == ("model", Path("out"), 3)
    assert quantize.act_order and not quantize.sym
    assert load_settings(QuantizeSettings, ["model", "--out", "there"]).out == Path("there")
    bench = load_settings(BenchSettings, ["a", "b", "c", "--json", "x.json", "--fp16", "f"])
    assert (bench.models, bench.json_file, bench.fp16) == (["a", "b", "c"], Path("x.json"), Path("f"))
    assert load_settings(BenchSettings, []).models == ["demo"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["model"], "--out is missing: gptq-api quantize MODEL OUT"),
        (["model", "out", "third"], "third"),
        (["model", "out", "--bits", "5"], "--bits"),
        (["model", "out", "--group-size", "0"], "--group-size: is -1"),
        (["model", "out", "--damp-percent", "0"], "--damp-percent"),
        (["model", "out", "--act-ordr"], "did you mean --act-order"),
        (["model", "out", "--port", "1"], "--port is not an option"),
    ],
)
def test_wrong_arguments_of_quantize_are_named(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", *args]) == 2
    printed = capsys.readouterr().err
    assert words in printed and len(printed.strip().splitlines()) == 1


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
