"""Probes, metrics, version."""

from __future__ import annotations

import asyncio

import msgspec
from fastapi import Request, Response

from gptq_api import __version__
from gptq_api.api.answers.encoding import json_response
from gptq_api.api.document.declare import answers
from gptq_api.api.metrics import CONTENT_TYPE
from gptq_api.api.routes.guard import guarded_router, metrics_router, public_router
from gptq_api.api.service import Service, ServiceDep

public = public_router()
router = guarded_router()
watching = metrics_router()


def _probe(service: Service, status: str, fault: str | None) -> Response:
    if fault is None:
        return json_response({"status": status})
    return json_response({"status": fault}, {"retry-after": str(service.engine.retry_after_s)}, 503)


@public.get("/health", **answers("Probe", also=(503,)))
async def health(service: ServiceDep) -> Response:
    """Liveness: 503 when the engine is gone, is being started again, or has been silent for too long over its work."""
    return _probe(service, "ok", _fault(service))


@public.get("/ready", **answers("Probe", also=(503,)))
async def ready(service: ServiceDep) -> Response:
    """Readiness: 503 also when the server was told to stop, before it refuses anything and while it finishes."""
    return _probe(service, "ready", "shutting down" if service.leaving or service.draining else _fault(service))


def _fault(service: Service) -> str | None:
    fault = service.engine.fault
    return fault and f"engine {fault}"


@watching.get("/metrics", **answers("Metrics", media_type=CONTENT_TYPE))
async def metrics(service: ServiceDep) -> Response:
    """Prometheus text format, under vLLM's names."""
    return Response(service.metrics.render(), media_type=CONTENT_TYPE)


@router.get("/version", **answers("Version"))
async def version() -> Response:
    """This package's version."""
    return json_response({"version": __version__})


@router.get("/server_info", **answers("ServerInfo"))
async def server_info(service: ServiceDep) -> Response:
    """What is served, and how: what the checkpoint is, by its tensors, and what it runs on."""
    ready = service.engine.ready
    answer = {
        "version": __version__,
        "model": service.model_name,
        "description": ready.description,
        "device": ready.device,
        "dtype": ready.dtype,
        "chat_template": service.template.source,
        "max_model_len": service.max_tokens,
        "max_num_seqs": ready.max_num_seqs,
        "kv_cache_tokens": ready.num_blocks * ready.block_size,
        "checkpoint": None if ready.facts is None else msgspec.structs.asdict(ready.facts),
    }
    return json_response(answer)


@router.get("/openapi.json", **answers("OpenApi"))
async def openapi(request: Request) -> Response:
    """What this server takes and answers, as OpenAPI 3.2."""
    return json_response(await asyncio.to_thread(request.app.state.document))
