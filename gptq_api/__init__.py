"""gptq-api: the server for 4-bit GPTQ LLaMA checkpoints."""

__version__ = "0.1.0"
