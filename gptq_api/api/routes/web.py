"""GET /: the page that chats. It holds nothing secret, so it needs no key, and asks for one where the API does."""

from __future__ import annotations

from fastapi import Request, Response

from gptq_api.api.document.declare import answers
from gptq_api.api.pages.page import MEDIA_TYPE, Page
from gptq_api.api.routes.guard import public_router

public = public_router()

PLAIN = "text/plain; charset=utf-8"
_PAGE = Page("chat.html", images="data:")  # its icon
_TEXT = """gptq-api: an OpenAI-compatible server.
A browser gets a page to chat here. Programs: the base URL ends in /v1; /docs and /openapi.json say what there is.
"""


@public.get("/", **answers("Page", media_type=(MEDIA_TYPE, PLAIN)))
async def web(request: Request) -> Response:
    """A page to chat for whoever accepts HTML, as browsers do; two lines of text for others."""
    html = _wants_html(request.headers.get("accept", ""))
    answer = _PAGE.answer() if html else Response(_TEXT, media_type=PLAIN)
    answer.headers["vary"] = "accept"
    return answer


def _wants_html(accept: str) -> bool:
    """Whether HTML is named: `*/*` is what programs send."""
    return any(kind.partition(";")[0].strip().lower() == "text/html" for kind in accept.split(","))
