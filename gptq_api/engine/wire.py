"""What crosses the socket between the API process and the engine, as frames of msgpack (`frames.py`)."""

from __future__ import annotations

import msgspec

from gptq_api.frames import WireError, frame
from gptq_api.types import FromEngine, ToEngine

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    """One message -> one frame."""
    return frame(_encoder.encode(message))


def decode_to_engine(payload: bytes) -> ToEngine:
    """Raises WireError."""
    try:
        return _to_engine.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise WireError(f"no message of ours: {error}") from None


def decode_from_engine(payload: bytes) -> FromEngine:
    """Raises WireError."""
    try:
        return _from_engine.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise WireError(f"no message of ours: {error}") from None
