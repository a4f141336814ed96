"""The process in which a checkpoint's tokenizer and chat template run, so that what they do stops nothing else.

Started with `child_command("gptq_api.text.worker", FD)`. It loads both and forks a worker, which answers the requests
of the socket in their order. A request that takes too much time is ended by the kernel, with the worker; one that takes
too much memory is an error or ends the worker. Then this process says so in the place of the answer, and forks the next
worker, which finds the tokenizer loaded. Which request a worker is at it leaves in memory that both see. End of file
ends both.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from gptq_api.child import end_with
from gptq_api.errors import UserError
from gptq_api.frames import read_payload
from gptq_api.text.chat import ChatTemplateError
from gptq_api.text.wire import (
    LOADING,
    NUMBER,
    Answer,
    Died,
    Encode,
    Ids,
    Load,
    Loaded,
    Refused,
    Render,
    Stage,
    Text,
    answer_frame,
    decode_load,
    decode_request,
    split_request,
)
from gptq_api.types import pack_ids

LOAD_S, LOAD_TEMPLATE_S = 60.0, 2.0
"""Processor time for loading; a vocabulary of 128k takes a second, a template some milliseconds"""
RENDER_S, ENCODE_S = 1.0, 1.0
"""of one rendering, and of one encoding"""
RENDER_S_PER_CHAR, ENCODE_S_PER_CHAR = 2e-6, 5e-6
"""more for every character; usual are 0.2 and 1 us"""
MAX_BYTES = 2**30
"""of memory for one request"""
MAX_LOAD_BYTES = 8 * 2**30
"""of address space while loading"""
_TIMERS: dict[Stage, int] = {
    "load": signal.ITIMER_PROF,
    "render": signal.ITIMER_PROF,
    "encode": signal.ITIMER_VIRTUAL,
}
"""Both count processor time, so a busy machine ends nobody; which of their signals it was says what took so long."""
RENDER_SIGNAL, ENCODE_SIGNAL = signal.SIGPROF, signal.SIGVTALRM


def render_limit(num_chars: int) -> float:
    """Seconds of processor time for rendering messages of so many characters."""
    return RENDER_S + RENDER_S_PER_CHAR * num_chars


def encode_limit(num_chars: int) -> float:
    """Seconds of processor time for encoding texts of so many characters."""
    return ENCODE_S + ENCODE_S_PER_CHAR * num_chars


def main(fd: str) -> int:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not live through a fork
    with socket.socket(fileno=int(fd)) as sock:
        first = read_payload(sock)
        if first is None:
            return 0
        work = _Work(decode_load(first))
        sock.sendall(answer_frame(LOADING, work.loaded))
        if isinstance(work.loaded, Refused):
            return 1
        gc.collect()
        gc.freeze()  # what the workers share is not touched by their collectors
        with mmap.mmap(-1, NUMBER.size) as current:
            while True:
                parent = os.getpid()
                worker = os.fork()
                if worker == 0:
                    end_with(parent)
                    os._exit(_work(sock, work, current))
                _, status = os.waitpid(worker, 0)
                code = os.waitstatus_to_exitcode(status)
                if code == 0:
                    return 0
                (number,) = NUMBER.unpack_from(current)
                NUMBER.pack_into(current, 0, 0)
                if number:  # it was not ended while it had nothing to do
                    with contextlib.suppress(OSError):
                        sock.sendall(answer_frame(number, Died(-code)))


def _work(sock: socket.socket, work: _Work, current: mmap.mmap) -> int:
    """Answer requests until the end of the file. Returns the exit status."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    most = _address_space() + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    # No file, socket or pipe is opened from here on, whatever a template finds a way to
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    try:
        while (payload := read_payload(sock)) is not None:
            number, data = split_request(payload)
            NUMBER.pack_into(current, 0, number)
            sock.sendall(answer_frame(number, work.answer(data)))
            NUMBER.pack_into(current, 0, 0)
    except OSError:  # nobody reads any more
        return 0
    return 0


def _address_space() -> int:
    """Bytes that this process has now."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        return pages * resource.getpagesize()
    except OSError:  # no /proc: as much as loading might have taken
        return MAX_LOAD_BYTES


@contextlib.contextmanager
def _within(seconds: float, stage: Stage) -> Iterator[None]:
    """Ends the process when it takes longer: nothing in it has to agree."""
    timer = _TIMERS[stage]
    signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        signal.setitimer(timer, 0)


class _Work:
    """The tokenizer and the template, and what is done with them."""

    def __init__(self, load: Load) -> None:
        from gptq_api.text.chat_template import load_chat_template
        from gptq_api.text.tokenizer import load_tokenizer

        folder = Path(load.folder)
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_least(MAX_LOAD_BYTES, soft), hard))
        self.loaded: Loaded | Refused
        what = "tokenizer"
        try:
            with _within(LOAD_S, "load"):
                self._tokenizer = load_tokenizer(folder)
            facts = None
            if load.with_template:
                what = "chat template"
                with _within(LOAD_TEMPLATE_S, "render"):
                    self._template = load_chat_template(
                        folder, self._tokenizer, override=load.template, model_name=load.model_name
                    )
                facts = self._template.facts
            self.loaded = Loaded(self._tokenizer.table, facts)
        except UserError as error:
            self.loaded = Refused(str(error), "load")
        except BaseException as error:  # a panic of the tokenizers library is none of Python's exceptions
            reason = "it takes too much memory" if isinstance(error, MemoryError) else _first_line(error)
            self.loaded = Refused(f"the {what} of {folder} cannot be loaded: {reason}", "load")
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        time.localtime()  # reads the time zone's file, while files can be read

    def answer(self, data: bytes) -> Answer:
        """Never raises."""
        stage: Stage = "encode"
        try:
            match decode_request(data):
                case Encode(texts, add_bos, parse_special):
                    with _within(encode_limit(sum(map(len, texts))), "encode"):
                        encode = self._tokenizer.encode
                        found = [encode(text, add_bos=add_bos, parse_special=parse_special) for text in texts]
                    return Ids([pack_ids(ids) for ids in found])
                case Render(messages, add_generation_prompt, continue_final_message, variables, as_text):
                    stage = "render"
                    with _within(render_limit(len(data)), "render"):
                        rendered = self._template.rendered(
                            messages, add_generation_prompt, continue_final_message, variables
                        )
                        if as_text:
                            return Text(rendered.text())
                    stage = "encode"
                    with _within(encode_limit(len(rendered.marked)), "encode"):
                        return Ids([pack_ids(rendered.ids())])
        except ChatTemplateError as error:
            return Refused(str(error), "render")
        except MemoryError:
            return Refused("it takes too much memory", stage)
        except BaseException as error:
            return Refused(_first_line(error), stage)


def _least(one: int, other: int) -> int:
    return one if other == resource.RLIM_INFINITY else min(one, other)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:300] or type(error).__name__
