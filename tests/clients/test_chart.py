"""The Helm chart by Helm itself, and what it makes beside Kubernetes' schemas (`make clients`)."""

from __future__ import annotations

import json
import math
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from gptq_api.config import Settings
from gptq_api.settings_source import load_settings
from tests.clients import environments

CHART = Path(__file__).parents[2] / "deploy" / "chart"
KEYS = {"apiKeys": {"existingSecret": "keys"}}
ALL: dict[str, Any] = {
    **KEYS,
    "model": "TheBloke/vicuna-7B-1.1-GPTQ",
    "revision": "gptq-4bit-128g-actorder_True",
    "settings": {
        "max_num_seqs": 128,
        "gpu_memory_utilization": 0.85,
        "engine_timeout_s": 120,
        "model_alias": ["gpt-4", 'with "quotes" <&>'],
        "log_json": True,
        "web_page": False,
    },
    "gpus": 2,
    "drain": {"delaySeconds": 2.5, "timeoutSeconds": 100, "marginSeconds": 10},
    "autoscaling": {"enabled": True},
    "cache": {"accessModes": ["ReadWriteMany"], "storageClass": "shared", "size": "1Ti"},
    "serviceMonitor": {"enabled": True, "bearerSecret": "metrics"},
    "dashboard": {"enabled": True},
    "podDisruptionBudget": {"enabled": True},
    "hubToken": {"existingSecret": "hub"},
    "extraEnv": [{"name": "OTEL_SERVICE_NAME", "value": "models"}],
    "extraVolumes": [{"name": "models", "hostPath": {"path": "/models"}}],
    "extraVolumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
    "nodeSelector": {"gpu": "yes"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "imagePullSecrets": [{"name": "registry"}],
}
CPU: dict[str, Any] = {"allowUnauthenticated": True, "device": "cpu", "cache": {"enabled": False}, "replicas": 3}


def helm(values: dict[str, Any]) -> dict[str, Any]:
    place = environments.folder("chart")
    command = [str(place / "bin" / "python"), str(Path(__file__).with_name("programs") / "helm_chart.py")]
    asked = json.dumps({"chart": str(CHART), "values": values})
    done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def made(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is made of the values, by its kind and name, held against Kubernetes' schemas."""
    found = helm(values)
    assert found["error"] is None and not found["lint"] and not found["invalid"], found
    return {f"{document['kind']} {document['metadata']['name']}": document for document in found["documents"]}


def settings_of(documents: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings file as the server reads it."""
    file = tmp_path / "gptq-api.toml"
    file.write_text(documents["ConfigMap models"]["data"]["gptq-api.toml"])
    assert tomllib.loads(file.read_text())["port"] == 8000
    return load_settings(Settings, ["--config", str(file)])


def container_of(documents: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    pod = documents["Deployment models"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return pod, container


@pytest.mark.parametrize("values", [KEYS, ALL, CPU], ids=["default", "all", "cpu"])
def test_kubernetes_takes_what_is_made_and_the_server_its_settings(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = made(values)
    settings = settings_of(documents, tmp_path, monkeypatch)
    pod, container = container_of(documents)
    for name, value in values.get("settings", {}).items():
        assert getattr(settings, name) == value
    assert settings.host == "0.0.0.0" and settings.port == container["ports"][0]["containerPort"]
    assert settings.model_path == values.get("model", "demo") and settings.revision == values.get("revision")
    assert settings.device == values.get("device", "cuda")
    margin = values.get("drain", {}).get("marginSeconds", 15)
    grace = pod["terminationGracePeriodSeconds"]
    assert grace == math.ceil(settings.drain_delay_s) + math.ceil(settings.drain_timeout_s) + margin
    probes = {name: container[name] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert [probe["httpGet"]["path"] for probe in probes.values()] == ["/ready", "/ready", "/health"]
    # a router has seen that it is leaving before the first request is refused
    assert settings.drain_delay_s >= probes["readinessProbe"]["periodSeconds"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {"/cache", "/tmp", "/etc/gptq-api/gptq-api.toml"} <= mounts
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    if settings.api_key_file is not None:
        assert str(settings.api_key_file.parent) in mounts and not settings.allow_unauthenticated
    gpus = container["resources"].get("limits", {}).get("nvidia.com/gpu")
    assert gpus == (None if settings.device == "cpu" else settings.tensor_parallel_size)
    assert settings.tensor_parallel_size == values.get("gpus", 1)
    labels = documents["Deployment models"]["spec"]["template"]["metadata"]["labels"]
    for selector in (
        documents["Deployment models"]["spec"]["selector"]["matchLabels"],
        documents["Service models"]["spec"]["selector"],
    ):
        assert selector.items() <= labels.items()


def test_every_part_can_be_asked_for() -> None:
    documents = made(ALL)
    assert {key.split()[0] for key in documents} == {
        *("ConfigMap", "Deployment", "Service", "PersistentVolumeClaim", "HorizontalPodAutoscaler"),
        *("PodDisruptionBudget", "ServiceMonitor"),
    }
    assert "replicas" not in documents["Deployment models"]["spec"], "the autoscaler's"
    board = json.loads(documents["ConfigMap models-dashboard"]["data"]["gptq-api.json"])
    assert board["uid"] == "gptq-api"
    env = {entry["name"]: entry for entry in container_of(documents)[1]["env"]}
    assert env["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "token"}
    assert not [word for word in json.dumps(documents).split() if "changeme" in word]


def test_another_setting_restarts_the_pods() -> None:
    first, second = (
        made({**KEYS, "settings": {"max_num_seqs": num}})["Deployment models"]["spec"]["template"]["metadata"]
        for num in (1, 2)
    )
    assert first["annotations"] != second["annotations"]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "apiKeys.existingSecret is empty: name a Secret"),
        ({**KEYS, "replica": 2}, "additional properties 'replica' not allowed"),
        ({**KEYS, "image": {"tags": "1"}}, "at '/image': additional properties 'tags' not allowed"),
        ({**KEYS, "settings": {"max_num_seq": 1}}, "at '/settings': additional properties 'max_num_seq' not allowed"),
        ({**KEYS, "settings": {"max_num_seqs": 0}}, "at '/settings/max_num_seqs'"),
        ({**KEYS, "settings": {"port": 9000}}, "additional properties 'port' not allowed"),
        ({**KEYS, "device": "tpu"}, "at '/device': value must be one of 'cpu', 'cuda'"),
        ({**KEYS, "allowUnauthenticated": True}, "apiKeys.existingSecret and allowUnauthenticated say the opposite"),
        ({**KEYS, "gpus": 9}, "at '/gpus': maximum: got 9, want 8"),
        ({**KEYS, "device": "cpu", "gpus": 2}, "gpus is 2, and device is cpu"),
        ({**KEYS, "replicas": 2}, "cache.accessModes is ReadWriteOnce"),
        ({**KEYS, "cache": {"size": "big"}}, "at '/cache/size'"),
        (
            {**ALL, "autoscaling": {"enabled": True, "minReplicas": 3, "maxReplicas": 2}},
            "autoscaling.maxReplicas is 2, less than autoscaling.minReplicas, which is 3",
        ),
        ({**KEYS, "serviceMonitor": {"enabled": True}}, "serviceMonitor.bearerSecret is empty"),
    ],
)
def test_a_mistake_is_a_sentence_that_names_the_value(values: dict[str, Any], says: str) -> None:
    found = helm(values)
    assert says in (found["error"] or "") or any(says in line for line in found["lint"]), found
