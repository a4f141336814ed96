"""`gptq-api list`: the models of the Hugging Face hub that are in the cache here."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime

from gptq_api import exits
from gptq_api.config import ListSettings
from gptq_api.hub_cache import cache_folder, cached_models


def run(settings: ListSettings) -> int:
    found = cached_models()
    if settings.json_output:
        print(json.dumps([asdict(model) for model in found], indent=2))
        return exits.DONE
    if not found:
        print(f"no models in {cache_folder()}; gptq-api pull OWNER/NAME downloads one")
        return exits.DONE
    rows = [("MODEL", "REVISION", "WEIGHTS", "SIZE", "LAST USED")]
    for model in found:
        used = datetime.fromtimestamp(model.last_used, UTC).strftime("%Y-%m-%d %H:%M")
        size = f"{model.size_bytes / 1e9:.2f} GB" if model.size_bytes >= 1e8 else f"{model.size_bytes / 1e6:.2f} MB"
        rows.append((model.name, model.revision, model.weights, size, used))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return exits.DONE
