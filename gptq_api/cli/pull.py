"""`gptq-api pull`: a model of the Hugging Face hub into the cache, so that a later start needs no network."""

from __future__ import annotations

from gptq_api import exits
from gptq_api.config import PullSettings
from gptq_api.hub import HubError, is_hub_name, local_model


def run(settings: PullSettings) -> int:
    """Prints the folder. HubError where it cannot be had."""
    if not is_hub_name(settings.model_path):
        raise HubError(
            f"{settings.model_path} is no name on the hub (OWNER/NAME), or a folder here: there is nothing to download"
        )
    print(local_model(settings.model_path, settings.revision, settings.gptq_ckpt))
    return exits.DONE
