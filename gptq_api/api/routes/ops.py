"""Probes, metrics, version."""

from __future__ import annotations

from fastapi import Request, Response

from gptq_api import __version__
from gptq_api.api.answers.encoding import json_response
from gptq_api.api.document.declare import answers
from gptq_api.api.metrics import CONTENT_TYPE
from gptq_api.api.routes.guard import guarded_router, public_router
from gptq_api.api.service import ServiceDep

public = public_router()
router = guarded_router()


def _probe(status: str, code: int) -> Response:
    return json_response({"status": status}, status=code)


@public.get("/health", **answers("Probe", also=(503,)))
async def health(service: ServiceDep) -> Response:
    """Liveness: 503 when the engine is gone, or has been silent for too long over its work: a restart
    helps, unless it wakes up."""
    fault = _fault(service)
    return _probe(fault, 503) if fault else _probe("ok", 200)


@public.get("/ready", **answers("Probe", also=(503,)))
async def ready(service: ServiceDep) -> Response:
    """Readiness: 503 also while the server finishes its last requests."""
    fault = "shutting down" if service.draining else _fault(service)
    return _probe(fault, 503) if fault else _probe("ready", 200)


def _fault(service: ServiceDep) -> str | None:
    if not service.engine.alive:
        return "engine dead"
    return "engine stalled" if service.engine.stalled else None


@router.get("/metrics", **answers("Metrics", media_type=CONTENT_TYPE))
async def metrics(service: ServiceDep) -> Response:
    """Prometheus text format, under vLLM's names."""
    return Response(service.metrics.render(), media_type=CONTENT_TYPE)


@router.get("/version", **answers("Version"))
async def version() -> Response:
    """This package's version."""
    return json_response({"version": __version__})


@router.get("/openapi.json", **answers("OpenApi"))
async def openapi(request: Request) -> Response:
    """What this server takes and answers, as OpenAPI 3.2."""
    return json_response(request.app.state.document)
