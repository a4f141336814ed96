"""The chart's files without Helm, which tests/clients/test_chart.py asks: values beside their schema, names beside what
the server has."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from gptq_api import __version__
from gptq_api.config import Settings
from tests.support.server import Server
from tools import chart_schema

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "chart"
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))


def test_the_schema_is_up_to_date() -> None:
    assert chart_schema.FILE.read_text(encoding="utf-8") == chart_schema.page(), "run: python tools/chart_schema.py"


def test_the_values_are_what_the_schema_has() -> None:
    schema = chart_schema.schema()
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(VALUES, schema)
    assert VALUES.keys() | {"global"} == schema["properties"].keys()


@pytest.mark.parametrize(
    ("values", "path", "says"),
    [
        ({"gpu": 1}, "", "'gpu' was unexpected"),
        ({"drain": {"delay": 1}}, "drain", "'delay' was unexpected"),
        ({"settings": {"max-num-seqs": 1}}, "settings", "'max-num-seqs' was unexpected"),
        ({"settings": {"num_threads": "2"}}, "settings.num_threads", "is not of type 'integer'"),
        ({"settings": {"speculate": "on"}}, "settings.speculate", "'on' is not one of"),
        ({"settings": {"api_key": ["secret"]}}, "settings", "'api_key' was unexpected"),
        ({"autoscaling": {"metrics": [{"name": "x"}]}}, "autoscaling.metrics.0", "'average' is a required property"),
    ],
)
def test_a_mistake_is_told_with_its_place(values: dict[str, Any], path: str, says: str) -> None:
    (error,) = jsonschema.Draft7Validator(chart_schema.schema()).iter_errors(values)
    assert ".".join(map(str, error.absolute_path)) == path and says in error.message


def test_every_setting_is_somewhere() -> None:
    """In `settings`, or written by the chart itself."""
    (CHART / "templates" / "configmap.yaml").read_text(encoding="utf-8")
    listed = set(chart_schema.settings()["properties"])
    assert listed | chart_schema.ELSEWHERE == Settings.model_fields.keys() and not listed & chart_schema.ELSEWHERE
    written = set(
        re.findall(
            r"^    ([a-z_]+) = ", (CHART / "templates" / "configmap.yaml").read_text(encoding="utf-8"), re.MULTILINE
        )
    )
    assert written == chart_schema.ELSEWHERE - {"api_key", "config"}


def test_templates_ask_for_values_that_exist() -> None:
    for file in sorted((CHART / "templates").iterdir()):
        for name in re.findall(r"\.Values\.([A-Za-z.]+)", file.read_text(encoding="utf-8")):
            place: Any = VALUES
            for part in name.split("."):
                assert isinstance(place, dict) and part in place, f"{file.name}: {name}"
                place = place[part]


def test_versions_are_the_packages() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert chart["appVersion"] == chart["version"] == project["version"] == __version__


def test_what_it_scales_by_is_measured(server: Server) -> None:
    """By names that the adapter's rules make of those of /metrics."""
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus-adapter.yaml").read_text(encoding="utf-8"))["rules"]["custom"]
    names = {rule["name"]["as"]: re.findall(r'__name__="([^"]+)"', rule["seriesQuery"])[0] for rule in rules}
    assert {metric["name"] for metric in VALUES["autoscaling"]["metrics"]} <= names.keys()
    for name in names.values():
        assert server.metric(name) >= 0


def test_nobody_waits_in_vain_for_a_pod_to_leave() -> None:
    settings = Settings()
    drain = VALUES["drain"]
    assert drain["timeoutSeconds"] >= settings.drain_timeout_s and drain["marginSeconds"] > 10
