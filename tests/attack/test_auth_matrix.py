"""Every route by every spelling and method, with every kind of key: nobody gets in without the right one."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from fastapi.routing import APIRoute

from gptq_api.api.app import ROUTERS
from gptq_api.api.routes.guard import PublicRoute
from tests.attack.client import Reply, Request, ask_all
from tests.support.server import Server

ROUTES = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
PUBLIC = {route.path for route in ROUTES if isinstance(route, PublicRoute)}
PATHS = sorted({route.path.replace("{model}", "strict") for route in ROUTES})
METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE")
KEYS: dict[str, tuple[tuple[str, str], ...]] = {
    "none": (),
    "empty": (("Authorization", "Bearer "),),
    "wrong": (("Authorization", "Bearer first-kez"),),
    "longer": (("Authorization", "Bearer first-key2"),),
    "both keys": (("Authorization", "Bearer first-key,second-key"),),
    "another scheme": (("Authorization", "Basic first-key"),),
    "two headers": (("Authorization", "Bearer first-key"), ("Authorization", "Bearer wrong")),
    "a cookie": (("Cookie", "authorization=first-key; api_key=first-key"),),
    "right": (("Authorization", "Bearer first-key"),),
}
SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda path: path,
    lambda path: "/" + path,
    lambda path: "/." + path,
    lambda path: "/health/.." + path,
    lambda path: "/%2e" + path,
    lambda path: "/%2e%2e" + path,
    lambda path: path + "/",
    lambda path: path + "/.",
    lambda path: path + "%2f",
    lambda path: path + "%00",
    lambda path: path + ";/health",
    lambda path: path + "?/health",
    lambda path: path + "?api_key=first-key&key=first-key",
    lambda path: path + "#/health",
    lambda path: path.upper(),
    lambda path: "/".join(part and f"%{ord(part[0]):02x}{part[1:]}" for part in path.split("/")),
    lambda path: path.replace("/", "\\"),
    lambda path: f"http://127.0.0.1{path}",
)
FOREIGN = (
    (("X-Forwarded-Prefix", "/health"), ("X-Original-URL", "/health"), ("X-Rewrite-URL", "/health")),
    (("X-Forwarded-For", "127.0.0.1"), ("X-HTTP-Method-Override", "GET"), ("Forwarded", "for=127.0.0.1")),
)


def ask(server: Server, requests: list[Request]) -> list[Reply]:
    replies = asyncio.run(ask_all(server.port, requests))
    assert len(replies) == len(requests) and all(0 < reply.status < 500 for reply in replies)
    return replies


def test_no_spelling_of_a_path_opens_it(strict_server: Server) -> None:
    requests = [
        Request(spelled(path), b"{}", (("Content-Type", "application/json"), *KEYS[key]), method)
        for path, spelled, method, key in itertools.product(PATHS, SPELLINGS, METHODS, ("none", "wrong"))
    ]
    for reply in ask(strict_server, requests):
        target = reply.request.path.removeprefix("http://127.0.0.1").partition("?")[0].partition("#")[0]
        if reply.status in (401, 404, 405, 400):
            continue
        spelled_public = any(target == spelled(path) for path in PUBLIC for spelled in (SPELLINGS[0], SPELLINGS[15]))
        assert spelled_public, (reply.request, reply.status)


def test_no_other_key_and_no_header_opens_a_route(strict_server: Server) -> None:
    requests = [
        Request(path, b"{}", (("Content-Type", "application/json"), *KEYS[key], *more), method)
        for path, key, more in itertools.product(PATHS, KEYS, ((), *FOREIGN))
        for method in ("GET", "POST")
    ]
    for reply in ask(strict_server, requests):
        request = reply.request
        if request.path in PUBLIC or reply.status == 405:
            continue
        right = (
            KEYS["right"][0] in request.headers and len([n for n, _ in request.headers if n == "Authorization"]) == 1
        )
        assert (reply.status == 401) is not right, (request, reply.status)


def test_no_host_opens_a_route(strict_server: Server) -> None:
    hosts = ("evil.example", "x/v1/models?", "127.0.0.1/health", "localhost:1", "[::1]", "health", "a@b", "")
    for host in hosts:
        for path in PATHS:
            if path not in PUBLIC:
                response = strict_server.http.get(path, headers={"host": host, "authorization": "Bearer wrong"})
                assert response.status_code in (401, 405, 400), (host, path)
