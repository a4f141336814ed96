"""The one way a checkpoint is refused."""


class CheckpointError(ValueError):
    """A checkpoint cannot be served. The text is one sentence that names the file, the tensor and the remedy."""
