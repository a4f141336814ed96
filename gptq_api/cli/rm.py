"""`gptq-api rm`: a model of the Hugging Face hub out of the cache here."""

from __future__ import annotations

from gptq_api import exits
from gptq_api.config import RmSettings
from gptq_api.hub_cache import remove


def run(settings: RmSettings) -> int:
    """HubError where it is not in the cache."""
    freed, left = remove(settings.model_path, settings.revision)
    more = f"; {left} other revision{'s' * (left > 1)} of it stay{'s' * (left == 1)}" if left else ""
    print(f"removed {settings.model_path}: {freed / 1e6:.1f} MB{more}")
    return exits.DONE
