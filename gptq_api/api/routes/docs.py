"""GET /docs: a page of our own that shows /openapi.json. Nothing of it comes from another host, which its policy also
tells the browser; it holds nothing secret, so it needs no key, and asks for one where the document does."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import Response

from gptq_api.api.document.declare import answers
from gptq_api.api.routes.guard import public_router

public = public_router()

_PAGE = files("gptq_api.api.document").joinpath("page.html").read_text(encoding="utf-8")


def _hash_of(tag: str) -> str:
    """As a policy names the one inline script or style."""
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", _PAGE, re.DOTALL)
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


_HEADERS = {
    "content-security-policy": (
        f"default-src 'none'; script-src {_hash_of('script')}; style-src {_hash_of('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
}


@public.get("/docs", **answers("Page", media_type="text/html; charset=utf-8"))
async def docs() -> Response:
    """This API for people."""
    return Response(_PAGE, headers=_HEADERS, media_type="text/html; charset=utf-8")
