"""A page of our own: one HTML file with one script and one style in it, and the policy that lets a browser run those
and nothing else. Nothing of it comes from another host. Text that it shows becomes text nodes, which the policy
enforces as well: a browser that knows Trusted Types throws where a string would be made HTML."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import Response

MEDIA_TYPE = "text/html; charset=utf-8"


class Page:
    """Read once. `name`: of the file beside this one; `images`: what the policy says of images, besides none."""

    def __init__(self, name: str, images: str = "") -> None:
        self.text = files("gptq_api.api.pages").joinpath(name).read_text(encoding="utf-8")
        self.headers = {
            "content-security-policy": (
                f"default-src 'none'; script-src {self._hash_of('script')}; style-src {self._hash_of('style')}; "
                f"{f'img-src {images}; ' if images else ''}connect-src 'self'; "
                "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
                "require-trusted-types-for 'script'; trusted-types 'none'"
            ),
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "same-origin",
            "cache-control": "no-cache",
        }

    def _hash_of(self, tag: str) -> str:
        """As a policy names the one inline script or style."""
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", self.text, re.DOTALL)
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    def answer(self) -> Response:
        return Response(self.text, headers=self.headers, media_type=MEDIA_TYPE)
