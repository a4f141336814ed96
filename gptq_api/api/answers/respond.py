"""The one way out: work goes to the client as a stream or whole, in the format of its endpoint."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from fastapi import Request, Response

from gptq_api.api.answers.encoding import json_response
from gptq_api.api.answers.formats import Told
from gptq_api.api.answers.stream import Shape, StreamResponse
from gptq_api.api.answers.work import Work
from gptq_api.edge.disconnect import until_disconnect


async def respond(
    request: Request, work: Work, shape: Shape, owned: ExitStack, *, stream: bool, headers: dict[str, str]
) -> Response:
    """`owned` ends the work when it is closed: a stream takes it over and closes it at its own end.

    Raises ApiError where the engine fails before a whole answer is there, ClientDisconnect when nobody waits for it.
    """
    if stream:
        return StreamResponse(work, shape, owned=owned.pop_all(), headers=headers)
    return json_response(await until_disconnect(request, whole(work, shape)), headers)


async def whole(work: Work, shape: Shape) -> dict[str, Any]:
    """All pieces of all choices, put together. Raises ApiError where the engine failed."""
    told = [Told() for _ in work.choices]
    async for pieces in work.pieces():
        for piece in pieces:
            told[piece.choice.index].add(piece)
    return shape.whole(work, told)
