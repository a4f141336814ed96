"""What the values of the Helm chart may be: writes deploy/chart/values.schema.json.

    python tools/chart_schema.py

`settings` are those of `gptq-api serve`, with their types and bounds, without those that other values are for.
Every object that is ours refuses names it does not know; what Kubernetes defines is left to Kubernetes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gptq_api.config import Settings

FILE = Path(__file__).parents[1] / "deploy" / "chart" / "values.schema.json"
ELSEWHERE = {
    *("host", "port", "config", "model_path", "revision", "device", "tensor_parallel_size"),
    *("api_key", "api_key_file", "allow_unauthenticated", "drain_delay_s", "drain_timeout_s"),
}
"""settings that other values of the chart are for"""
SIZE = r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?$"


def of(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, **more}


def closed(**properties: dict[str, Any]) -> dict[str, Any]:
    return of("object", additionalProperties=False, properties=properties)


TEXT, NAME, FLAG = of("string"), of("string", minLength=1), of("boolean")
LABELS = of("object", additionalProperties=of("string"))
THEIRS = of("object")
"""what Kubernetes defines"""
LIST = of("array", items=THEIRS)
COUNT, SECONDS = of("integer", minimum=1), of("number", minimum=0)
ENTRY = closed(existingSecret=TEXT, key=NAME)


def settings() -> dict[str, Any]:
    """Of `gptq-api serve`, each as JSON Schema, without null: who leaves one out has its default."""
    found = {}
    for name, field in Settings.model_json_schema()["properties"].items():
        if name in ELSEWHERE:
            continue
        kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
        kept = {
            key: value for kind in kinds for key, value in kind.items() if key not in ("title", "default", "examples")
        }
        kept.pop("format", None)
        found[name] = {**kept, "description": " ".join(field["description"].split())}
    return closed(**found)


def schema() -> dict[str, Any]:
    ranks = Settings.model_json_schema()["properties"]["tensor_parallel_size"]
    count_or_share = {"type": ["integer", "string"]}
    values = closed(
        image=closed(repository=NAME, tag=TEXT, pullPolicy=of("string", enum=["Always", "IfNotPresent", "Never"])),
        imagePullSecrets=LIST,
        device=of("string", enum=["cpu", "cuda"]),
        gpus=of("integer", minimum=ranks["minimum"], maximum=ranks["maximum"]),
        model=NAME,
        revision=TEXT,
        settings=settings(),
        apiKeys=ENTRY,
        allowUnauthenticated=FLAG,
        hubToken=ENTRY,
        replicas=of("integer", minimum=0),
        strategy=closed(
            type=of("string", enum=["RollingUpdate", "Recreate"]),
            rollingUpdate=of(
                "object",
                additionalProperties=False,
                properties={"maxSurge": count_or_share, "maxUnavailable": count_or_share},
            ),
        ),
        drain=closed(delaySeconds=of("number", minimum=0, maximum=3600), timeoutSeconds=SECONDS, marginSeconds=SECONDS),
        startupSeconds=of("integer", minimum=5),
        service=closed(
            type=of("string", enum=["ClusterIP", "NodePort", "LoadBalancer"]),
            port=of("integer", minimum=1, maximum=65535),
            annotations=LABELS,
        ),
        cache=closed(
            enabled=FLAG,
            existingClaim=TEXT,
            size=of("string", pattern=SIZE),
            storageClass=TEXT,
            accessModes=of(
                "array",
                minItems=1,
                items=of("string", enum=["ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"]),
            ),
        ),
        resources=closed(requests=THEIRS, limits=THEIRS),
        autoscaling=closed(
            enabled=FLAG,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            metrics=of("array", minItems=1, items={**closed(name=NAME, average=NAME), "required": ["name", "average"]}),
            scaleDownSeconds=of("integer", minimum=0, maximum=3600),
        ),
        serviceMonitor=closed(enabled=FLAG, interval=NAME, labels=LABELS, bearerSecret=TEXT, bearerKey=NAME),
        dashboard=closed(enabled=FLAG, labels=LABELS),
        podDisruptionBudget=closed(enabled=FLAG, maxUnavailable=count_or_share),
        podLabels=LABELS,
        podAnnotations=LABELS,
        nodeSelector=LABELS,
        tolerations=LIST,
        affinity=THEIRS,
        priorityClassName=TEXT,
        runtimeClassName=TEXT,
        extraEnv=LIST,
        extraVolumes=LIST,
        extraVolumeMounts=LIST,
        **{"global": THEIRS},  # Helm's own, of a chart around this one
    )
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "gptq-api", **values}


def page() -> str:
    return json.dumps(schema(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
