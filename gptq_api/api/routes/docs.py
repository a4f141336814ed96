"""GET /docs: a page of our own that shows /openapi.json. It holds nothing secret, so it needs no key, and asks for one
where the document does."""

from __future__ import annotations

from fastapi import Response

from gptq_api.api.document.declare import answers
from gptq_api.api.pages.page import MEDIA_TYPE, Page
from gptq_api.api.routes.guard import public_router

public = public_router()

_PAGE = Page("docs.html")


@public.get("/docs", **answers("Page", media_type=MEDIA_TYPE))
async def docs() -> Response:
    """This API for people."""
    return _PAGE.answer()
