"""The one way a checkpoint is refused."""

from __future__ import annotations

from gptq_api.errors import UserError


class CheckpointError(UserError):
    """A checkpoint cannot be served. The text is one sentence that names the file, the tensor and the remedy."""
