"""The engine process: a reader thread empties the socket, the main thread steps the model.

A child process (`gptq_api/child.py`) of engine/client.py; the first frame is EngineOptions. End of file on the
socket is the shutdown message, and the only one: it comes however the API process ends. Where that is killed, so is an
engine that cannot read it.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import queue
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_api import frames
from gptq_api.engine import torch_parts, wire
from gptq_api.engine.options import EngineOptions
from gptq_api.errors import UserError
from gptq_api.types import Abort, Add, Failed, Ready, ToEngine

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from gptq_api.grammar.matchers import Compiled

_log = logging.getLogger(__name__)

GRACE_S = 1.5
"""How long a step (or a load) may still take after the API process is gone."""


@dataclass(slots=True, frozen=True)
class _Compiled:
    """From the thread that compiles grammars."""

    grammar: str
    found: Compiled


Inbox = queue.SimpleQueue[ToEngine | _Compiled | None]


def main(fd: str) -> int:
    """Serve one API process until it closes the socket. Returns the exit status."""
    sock = socket.socket(fileno=int(fd))
    gc.disable()  # what is imported stays, and the collector would look at it again and again
    first = frames.read_payload(sock)
    if first is None:
        return 0
    told = EngineOptions.decoded(first)
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sock, inbox), name="inbox", daemon=True).start()
    try:
        return _serve(sock, inbox, told)
    except (BrokenPipeError, ConnectionResetError):
        return 0


def _read(sock: socket.socket, inbox: Inbox) -> None:
    """Always draining, so that the API process never waits for a step to end."""
    try:
        while (payload := frames.read_payload(sock)) is not None:
            inbox.put(wire.decode_to_engine(payload))
    except OSError:
        pass
    except frames.WireError:
        _log.exception("the API process sent what is no message of ours")
    inbox.put(None)
    time.sleep(GRACE_S)
    os._exit(0)  # the main thread is deep in a long step or still loading, for nobody


def _serve(sock: socket.socket, inbox: Inbox, told: EngineOptions) -> int:
    torch_parts.load_when_asked()
    import torch

    from gptq_api.engine.core import Engine
    from gptq_api.engine.draft_vocabulary import check_vocabulary
    from gptq_api.engine.kv_events import KvEvents, Publisher
    from gptq_api.engine.trace import Trace, TraceHead
    from gptq_api.grammar.matchers import Grammars
    from gptq_api.grammar.vocabulary import vocabulary
    from gptq_api.runner.backends import token_budget
    from gptq_api.runner.load import identify, load_runner
    from gptq_api.scheduler.blocks import BlockManager
    from gptq_api.scheduler.scheduler import Scheduler
    from gptq_api.scheduler.speculation import speculation_of
    from gptq_api.text.folder import checkpoint_folder
    from gptq_api.text.process import BlockingTokenizer

    gc.freeze()
    options = told.load
    try:
        publisher = None if told.kv_events is None else Publisher(told.kv_events)
        trace = None if told.trace is None else Trace(told.trace)  # told before minutes of loading
        checkpoint = identify(options)
        check_vocabulary(options)
        runner = load_runner(options)
        if trace is not None:
            sizes = (runner.block_size, runner.num_blocks, options.max_num_seqs)
            trace.begin(TraceHead(options.model_path, runner.device, runner.dtype, *sizes))
    except UserError as error:
        sock.sendall(wire.encode(Failed(str(error))))
        return 1
    except MemoryError:
        sock.sendall(wire.encode(Failed("there is not enough memory to load the model")))
        return 1
    except Exception as error:
        _log.exception("loading the model failed by a bug")
        (line, *_) = str(error).splitlines() or [""]
        said = f"loading the model failed by a bug, told above: {type(error).__name__}: {line}"
        sock.sendall(wire.encode(Failed(said[:500])))
        return 1
    budget = token_budget(options, torch.device(runner.device))
    vocab_size, ends = runner.vocab_size, runner.eos_token_ids

    def load_vocabulary() -> LLTokenizer:
        tokenizer = BlockingTokenizer(checkpoint_folder(options.model_path))
        return vocabulary(tokenizer, vocab_size, tokenizer.end_ids(ends, vocab_size) or (0,))

    grammars = Grammars(load_vocabulary, vocab_size)
    kv_events = None
    if publisher is not None:
        kv_events = KvEvents(publisher.publish, runner.block_size, runner.device)
        atexit.register(kv_events.end)  # called before what was registered before: the publisher is still there
    blocks = BlockManager(runner.num_blocks, runner.block_size, kv_events)
    scheduler = Scheduler(
        blocks,
        options.max_num_seqs,
        budget,
        told.enable_prefix_caching,
        runner.row_multiple,
        shared_rows=runner.shared_rows,
        speculation=speculation_of(told.speculate, runner, runner.drafter, runner.block_size),
        prompt_costs=runner.prompt_costs,
        prompts_apart=runner.prompts_apart,
    )
    engine = Engine(
        runner,
        scheduler,
        trace,
        grammars,
        post=lambda *compiled: inbox.put(_Compiled(*compiled)),
        num_events_dropped=lambda: 0 if publisher is None else publisher.num_dropped,
    )
    gc.collect()
    gc.freeze()  # the weights never die: keep the collector off them
    gc.enable()
    ready = Ready(
        max_model_len=runner.max_model_len,
        vocab_size=runner.vocab_size,
        block_size=runner.block_size,
        num_blocks=runner.num_blocks,
        max_num_seqs=options.max_num_seqs,
        device=runner.device,
        dtype=runner.dtype,
        eos_token_ids=runner.eos_token_ids,
        description=runner.description,
        facts=runner.facts,
        checkpoint=checkpoint.digest,
        checkpoint_written=checkpoint.written,
    )
    sock.sendall(wire.encode(ready))
    grammars.prepare()
    unanswered = False
    while True:
        while not engine.has_work() or not inbox.empty():
            if unanswered and inbox.empty():  # about to sleep: the API process learns the state
                sock.sendall(wire.encode(engine.report()))
                unanswered = False
            match inbox.get():
                case Add() as message:
                    engine.add(message)
                case Abort(sequence_ids):
                    for sequence_id in sequence_ids:
                        engine.abort(sequence_id)
                case _Compiled(grammar, found):
                    engine.compiled(grammar, found)
                case None:
                    return 0
            unanswered = True
        output = engine.step()
        if output is not None:
            sock.sendall(wire.encode(output))  # one message per step, whatever the batch size
            unanswered = False
        if kv_events is not None:
            kv_events.flush()
