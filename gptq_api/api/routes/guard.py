"""The two kinds of routes there are: guarded ones, which is what a router makes, and the few public ones.

A guarded route checks the key and its role before it reads a byte of the body, then reads the body within the limit
and parses it. Authentication is what a route is, not what its path looks like.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, cast

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel

from gptq_api.api import in_process
from gptq_api.api.body import JsonRequest
from gptq_api.api.errors import wrong_key, wrong_role
from gptq_api.api.service import get_record, get_service
from gptq_api.edge.auth import why_refused
from gptq_api.edge.keys import Role


class _Route(APIRoute):
    """What can be asked with GET can be asked with HEAD: the same answer, of which the connection sends no body."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.methods and "GET" in self.methods:
            self.methods.add("HEAD")


class PublicRoute(_Route):
    """For probes and the page that shows the API: tells nothing that not everyone may know."""


class GuardedRoute(_Route):
    """For everything else."""

    role: Role = "user"
    """which keys may use it, besides those that may all"""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        model = None if self.body_field is None else cast(type[BaseModel], self.body_field.field_info.annotation)

        async def guarded(request: Request) -> Response:
            service = get_service(request)
            behalf = in_process.behalf_of(request.scope)
            if behalf is not None:
                caller = service.auth.in_background(behalf)
            else:
                caller = service.auth.check(request.headers, request.client.host if request.client else "")
            if caller is None:
                raise wrong_key(why_refused(request.headers) if behalf is None else "Its key is not known any more")
            record = get_record(request)
            record.in_background = behalf is not None
            record.caller = caller
            if caller.account is not None:
                record.notes["key"] = caller.account.name
            if not caller.may(self.role):
                raise wrong_role(caller.role, self.role)
            if model is not None:
                request = JsonRequest(request.scope, request.receive)
                await request.load(service, model)
            return await handle(request)

        return guarded


class MetricsRoute(GuardedRoute):
    """For what watches the server: it tells of everybody's use."""

    role = "metrics"


def guarded_router() -> APIRouter:
    return APIRouter(route_class=GuardedRoute)


def metrics_router() -> APIRouter:
    return APIRouter(route_class=MetricsRoute)


def public_router() -> APIRouter:
    return APIRouter(route_class=PublicRoute)
