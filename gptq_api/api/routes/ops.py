"""Probes, metrics, version."""

from __future__ import annotations

from fastapi import Request, Response

from gptq_api import __version__
from gptq_api.api.metrics import CONTENT_TYPE
from gptq_api.api.route import guarded_router, public_router
from gptq_api.api.service import ServiceDep
from gptq_api.api.shapes import json_bytes

public = public_router()
router = guarded_router()


def _probe(status: str, code: int) -> Response:
    return Response(json_bytes({"status": status}), code, media_type="application/json")


@public.get("/health")
async def health(service: ServiceDep) -> Response:
    """Liveness: 503 when the engine is gone and only a restart helps."""
    return _probe("ok", 200) if service.engine.alive else _probe("engine dead", 503)


@public.get("/ready")
async def ready(service: ServiceDep) -> Response:
    """Readiness: 503 also while the server finishes its last requests."""
    if service.draining:
        return _probe("shutting down", 503)
    return _probe("ready", 200) if service.engine.alive else _probe("engine dead", 503)


@router.get("/metrics")
async def metrics(service: ServiceDep) -> Response:
    """Prometheus text format, under vLLM's names."""
    return Response(service.metrics.render(), media_type=CONTENT_TYPE)


@router.get("/version")
async def version() -> Response:
    """This package's version."""
    return Response(json_bytes({"version": __version__}), media_type="application/json")


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request) -> Response:
    """What this server takes, as OpenAPI 3.1."""
    return Response(json_bytes(request.app.openapi()), media_type="application/json")
