"""compose.yaml, its files and the systemd unit: what they mount is there, what they set exists, and times fit."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gptq_api.config import Settings, flag
from gptq_api.settings_source import load_settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def seconds(text: str) -> int:
    assert text.endswith("s")
    return int(text[:-1])


def test_the_server_takes_its_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = SERVICES["server"]
    for name, value in server["environment"].items():
        if name.startswith("GPTQ_API_"):
            assert name.removeprefix("GPTQ_API_").lower() in Settings.model_fields
            monkeypatch.setenv(name, re.sub(r"\$\{API_KEY:\?[^}]*\}", "secret", value))
    command = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in server["command"]]
    assert command[0] == "serve"
    settings = load_settings(Settings, command[1:])
    assert settings.model_path == "demo" and settings.api_key == ["secret"]
    assert seconds(server["stop_grace_period"]) >= settings.drain_delay_s + settings.drain_timeout_s + 10
    assert server["read_only"] and server["cap_drop"] == ["ALL"] and server["volumes"] == ["cache:/cache"]


def test_what_is_mounted_is_there_and_volumes_are_named() -> None:
    for name, service in SERVICES.items():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], name
    (DEPLOY / SERVICES["server"]["build"]["context"] / "Dockerfile").resolve(strict=True)


def test_only_this_machine_is_listened_to() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 3 and all(port.startswith("127.0.0.1:") for port in ports)
    assert len({port.split(":")[1] for port in ports}) == 3


def test_a_missing_key_is_a_sentence() -> None:
    asked = {value for service in SERVICES.values() for value in service.get("environment", {}).values()}
    told = [value for value in asked if value.startswith("${API_KEY")]
    assert told and all(value.startswith("${API_KEY:?say which key") for value in told)


def test_prometheus_and_grafana_find_each_other() -> None:
    port = Settings.model_fields["port"].default
    prometheus = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text(encoding="utf-8"))
    (job,) = prometheus["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"server:{port}"]}]
    (command,) = SERVICES["prometheus"]["command"]
    assert f'"$$API_KEY" >{job["authorization"]["credentials_file"]};' in command
    assert "./prometheus.yaml:/etc/prometheus/prometheus.yml:ro" in SERVICES["prometheus"]["volumes"]
    assert "--config.file=/etc/prometheus/prometheus.yml " in command
    (source,) = yaml.safe_load((DEPLOY / "grafana/datasources/prometheus.yaml").read_text(encoding="utf-8"))[
        "datasources"
    ]
    assert source["url"].split("//")[1].split(":")[0] in SERVICES
    (provider,) = yaml.safe_load((DEPLOY / "grafana/dashboards/gptq-api.yaml").read_text(encoding="utf-8"))["providers"]
    assert f"./chart/dashboards:{provider['options']['path']}:ro" in SERVICES["grafana"]["volumes"]
    assert SERVICES["open-webui"]["environment"]["OPENAI_API_BASE_URL"] == f"http://server:{port}/v1"


def test_the_gpu_file_changes_the_server_alone() -> None:
    gpu = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text(encoding="utf-8"))
    assert gpu["services"].keys() == {"server"}
    assert gpu["services"]["server"]["build"]["args"] == {"DEVICE": "cuda"}


UNIT = (DEPLOY / "gptq-api.service").read_text(encoding="utf-8")


def of_unit(name: str) -> str:
    (value,) = re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)
    return str(value)


def test_the_unit_starts_the_server_and_gives_it_its_time() -> None:
    program, command, *options = shlex.split(of_unit("ExecStart"))
    assert Path(program).name == "gptq-api" and command == "serve"
    assert {word for word in options if word.startswith("--")} <= {flag(name) for name in Settings.model_fields}
    settings = Settings()
    assert int(of_unit("TimeoutStopSec")) >= settings.drain_delay_s + settings.drain_timeout_s + 10
    assert of_unit("RestartPreventExitStatus") == "1 2"


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here: apt-get install systemd")
    unit = UNIT.replace(shlex.split(of_unit("ExecStart"))[0], sys.executable).replace("User=gptq", "User=root")
    file = tmp_path / "gptq-api.service"
    file.write_text(unit)
    command = ["systemd-analyze", "verify", "--man=no", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "gptq-api.service" in line]
    assert done.returncode == 0 and not ours, done.stdout + done.stderr
