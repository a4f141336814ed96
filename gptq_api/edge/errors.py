"""What the edge has to know of errors: that the API has a body for each."""

from __future__ import annotations

from collections.abc import Callable

ErrorBody = Callable[[int, str], bytes]
"""(status, message) -> the JSON body of the error, as the clients of the API expect it"""
