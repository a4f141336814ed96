"""The one way out: work goes to the client as a stream or whole, in the format of its endpoint."""

from __future__ import annotations

from contextlib import ExitStack

from fastapi import Request, Response

from gptq_api.api.answers.encoding import json_response
from gptq_api.api.answers.formats import Format, Told
from gptq_api.api.answers.stream import StreamResponse
from gptq_api.api.answers.work import Work
from gptq_api.edge.disconnect import until_disconnect


async def respond(
    request: Request, work: Work, shape: Format, owned: ExitStack, *, stream: bool, headers: dict[str, str]
) -> Response:
    """A stream takes over what is `owned`, which ends the work, and ends it when it has ended itself.

    Raises ApiError where the engine fails before a whole answer is there, ClientDisconnect when nobody waits for it.
    """
    if stream:
        return StreamResponse(work, shape, owned=owned.pop_all(), headers=headers)
    return json_response(await until_disconnect(request, _whole(work, shape)), headers)


async def _whole(work: Work, shape: Format) -> dict[str, object]:
    told = [Told() for _ in work.choices]
    async for pieces in work.pieces():
        for piece in pieces:
            told[piece.choice.index].add(piece)
    return shape.whole(work, told)
