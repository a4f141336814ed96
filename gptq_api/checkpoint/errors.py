"""The one way a checkpoint is refused."""

from __future__ import annotations

from gptq_api.errors import UserError, printable

_LONGEST = 2000


class CheckpointError(UserError):
    """A checkpoint cannot be served. The text is one sentence that names the file, the tensor and the remedy; names and
    values are the checkpoint's, so what is not to be printed in them is escaped, and what is long is cut."""

    def __init__(self, text: str) -> None:
        text = printable(text)
        super().__init__(text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}")
