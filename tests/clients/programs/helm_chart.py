"""Helm itself, and Kubernetes' schemas: reads {"chart": FOLDER, "values": {...}} and prints what comes of them."""

import json
import sys

import helm_python
import kubernetes_validate
import yaml

asked = json.load(sys.stdin)
found = {"lint": [], "documents": [], "invalid": [], "error": None}
try:
    report = helm_python.lint(asked["chart"], asked["values"], strict=True)
    found["lint"] = [message["error"] for message in report["messages"] if message["severity"] > 1] + report["errors"]
    with helm_python.Chart.load(asked["chart"]) as chart:
        rendered = chart.render(asked["values"], name="models", namespace="there")
    for path, text in rendered.items():
        for document in yaml.safe_load_all(text) if path.endswith(".yaml") else ():
            if document is None:
                continue
            found["documents"].append(document)
            try:
                kubernetes_validate.validate(document, "1.37", strict=True)
            except kubernetes_validate.SchemaNotFoundError:
                if document["apiVersion"].split("/")[0] != "monitoring.coreos.com":
                    raise
            except kubernetes_validate.ValidationError as error:
                found["invalid"].append(f"{path}: {error.message}")
except helm_python.HelmError as error:
    found["error"] = str(error)
json.dump(found, sys.stdout)
