"""Servers behind Ray Serve: each replica has a `gptq-api serve` of its own, and hands requests on to it.

    pip install 'ray[serve]' httpx
    MODEL=demo REPLICAS=2 serve run examples.ray_serve:app

Ray starts replicas, asks their health and restarts them. It routes without knowing what is cached; smg knows
(docs/operations.md). COMMAND is what starts a server, if not `gptq-api`.
"""

import os
import shlex
import socket
import subprocess
import time
from collections.abc import AsyncIterator

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from ray import serve

api = FastAPI()
DRAIN_S = 30
PASSED_ON = ("content-type", "x-request-id", "retry-after")


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@serve.deployment(
    num_replicas=int(os.environ.get("REPLICAS", "2")),
    max_ongoing_requests=256,
    health_check_period_s=5,
    graceful_shutdown_timeout_s=DRAIN_S + 10,
)
@serve.ingress(api)
class Replica:
    """A server as a child process, which is told to end when Ray stops the replica."""

    def __init__(self, model: str) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        options = ["--port", str(port), "--drain-timeout-s", str(DRAIN_S)]
        self.server = subprocess.Popen([*shlex.split(os.environ.get("COMMAND", "gptq-api")), "serve", model, *options])
        url = f"http://127.0.0.1:{port}"
        while not _answers(url):
            if self.server.poll() is not None:
                raise RuntimeError(f"gptq-api serve left with {self.server.returncode}; its log says why")
            time.sleep(0.1)
        self.client = httpx.AsyncClient(base_url=url, timeout=None)  # noqa: S113  (the server has limits)

    async def check_health(self) -> None:
        """Ray starts another replica where this raises."""
        (await self.client.get("/ready", timeout=5)).raise_for_status()

    @api.api_route("/{path:path}", methods=["GET", "POST"])
    async def hand_on(self, path: str, request: Request) -> StreamingResponse:
        headers = {name: value for name, value in request.headers.items() if name not in ("host", "content-length")}
        asked = self.client.build_request(request.method, f"/{path}", headers=headers, content=await request.body())
        answer = await self.client.send(asked, stream=True)

        async def body() -> AsyncIterator[bytes]:
            try:
                async for part in answer.aiter_raw():
                    yield part
            finally:  # also where the client has left: the server then forgets the request
                await answer.aclose()

        kept = {name: value for name, value in answer.headers.items() if name in PASSED_ON}
        return StreamingResponse(body(), answer.status_code, kept)

    def __del__(self) -> None:
        self.server.terminate()
        self.server.wait(DRAIN_S + 5)


app = Replica.bind(os.environ.get("MODEL", "demo"))
