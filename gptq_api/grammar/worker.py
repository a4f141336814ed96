"""The child process that tries grammars out, so that one that is hostile stops nothing else.

A frame in is a grammar, a frame out why it is refused, "" where it is not; both are 4 bytes of length, little-endian,
and UTF-8. End of file ends the process, and so does a grammar that takes too much processor time, by SIGPROF.
"""

from __future__ import annotations

import resource
import signal
import struct
import sys

MAX_BYTES = 2**30
"""of address space"""
MAX_S = 0.5
"""of processor time for one grammar: a busy machine refuses none"""
LENGTH = struct.Struct("<I")


def main() -> int:
    from llguidance import LLMatcher, LLTokenizer

    from gptq_api.grammar.compile import limits
    from gptq_api.grammar.vocabulary import byte_vocabulary

    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizer: LLTokenizer | None = None
    while (frame := _read()) is not None:
        error = ""
        if tokenizer is None:  # the first frame: the names of the control tokens
            tokenizer = byte_vocabulary(frame.split("\0") if frame else [])
        else:
            signal.setitimer(signal.ITIMER_PROF, MAX_S)
            matcher = LLMatcher(tokenizer, frame, limits=limits(), log_level=0)
            matcher.compute_bitmask()  # what is built lazily is built with the first mask
            signal.setitimer(signal.ITIMER_PROF, 0)
            error = matcher.get_error()
        _write(error[:4096])
    return 0


def _read() -> str | None:
    head = sys.stdin.buffer.read(LENGTH.size)
    return sys.stdin.buffer.read(LENGTH.unpack(head)[0]).decode() if head else None


def _write(text: str) -> None:
    data = text.encode()
    sys.stdout.buffer.write(LENGTH.pack(len(data)) + data)
    sys.stdout.buffer.flush()
