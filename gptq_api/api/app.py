"""The ASGI application: routes and error handlers."""

from __future__ import annotations

from functools import cache, partial

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from gptq_api import __version__
from gptq_api.api.document.openapi import openapi_document
from gptq_api.api.errors import on_exception, on_http_exception, on_validation_error
from gptq_api.api.routes import (
    batches,
    chat,
    completions,
    docs,
    files,
    messages,
    models,
    ops,
    responses,
    tokens,
    web,
)
from gptq_api.api.routes.guard import PublicRoute
from gptq_api.api.traces import NO_TELEMETRY, Traces
from gptq_api.config import Settings
from gptq_api.edge.auth import Authenticator

ROUTERS = (
    ops.public,
    docs.public,
    web.public,
    ops.router,
    ops.watching,
    models.router,
    chat.router,
    completions.router,
    responses.router,
    messages.router,
    tokens.router,
)
WITH_A_FOLDER = (files.router, batches.router)
"""where there is a place to keep things"""


def build_app(settings: Settings, auth: Authenticator, traces: Traces | None = None) -> FastAPI:
    """Routes and handlers; they answer once `state.service` is set. The framework's own pages are left out (they load
    scripts from elsewhere)."""
    app = FastAPI(
        title="gptq-api",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        telemetry=NO_TELEMETRY if traces is None else traces.of_requests(),
        exception_handlers={
            HTTPException: on_http_exception,
            RequestValidationError: on_validation_error,
            Exception: on_exception,
        },
    )
    routers = [router for router in ROUTERS if settings.web_page or router is not web.public]
    routers += WITH_A_FOLDER if settings.batch_dir is not None else ()
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    app.state.routes = routes
    app.state.paths = [route.path.partition("{")[0] for route in routes if route.path != "/"]  # nobody means that one
    # made when somebody asks for it: a quarter of a second
    app.state.document = cache(
        partial(
            openapi_document,
            routes,
            {route.path for route in routes if isinstance(route, PublicRoute)},
            title=app.title,
            version=app.version,
            keyed=auth.has_keys,
            with_roles=settings.api_key_file is not None,
            any_model=settings.accept_any_model,
        )
    )
    for router in routers:
        app.include_router(router)
    return app
