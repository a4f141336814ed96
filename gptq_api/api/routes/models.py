"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import HTTPException, Path, Response

from gptq_api.api.answers.encoding import json_response
from gptq_api.api.document.declare import answers
from gptq_api.api.routes.guard import guarded_router
from gptq_api.api.service import Service, ServiceDep

router = guarded_router()


def _card(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.engine.ready.checkpoint_written,
        "owned_by": "gptq-api",
        "max_model_len": service.max_tokens,
    }


@router.get("/v1/models", **answers("Models"))
async def list_models(service: ServiceDep) -> Response:
    """The one model that is served, once for each of its names."""
    return json_response({"object": "list", "data": [_card(service, name) for name in service.names]})


@router.get("/v1/models/{model:path}", **answers("Model", errors=(400, 404)))
async def retrieve_model(model: Annotated[str, Path(max_length=512)], service: ServiceDep) -> Response:
    """What is known about it."""
    if not model:
        raise HTTPException(404)  # /v1/models/ with a slash too many
    service.check_model(model)
    return json_response(_card(service, model))
