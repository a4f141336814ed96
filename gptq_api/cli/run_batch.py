"""`gptq-api run-batch REQUESTS OUT`: the requests of a file, without a server.

What is answered stands in OUT.partial until all is: a run that was killed goes on when it is started again.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from gptq_api import exits
from gptq_api.batch.folder import BatchFolder, copied, whole_file
from gptq_api.batch.lines import LineError, read_input
from gptq_api.batch.records import BatchRecord, End, FileRecord
from gptq_api.batch.store import Store, new_batch_id, new_file_id
from gptq_api.cli.output import fail
from gptq_api.config import EngineSettings, RunBatchSettings, Settings
from gptq_api.errors import UserError
from gptq_api.logs import answer
from gptq_api.on_disk import unreadable

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp

    from gptq_api.edge.auth import Authenticator

log = structlog.get_logger()

_FOR_EVER = 2**40
"""a time that does not come"""
_MAX_LINE_BYTES = 64 * 2**20
"""what the model's context allows is seen when it is there"""
_SHOWN = 5
"""errors of a file that are told"""
_RESTARTS = 10
"""of an engine that dies, within ten minutes: a line over which three die is given up"""
_PROGRESS_S = 5.0


class RequestsError(UserError):
    """The requests cannot be run; a sentence with the file, the line and the remedy."""


def run(settings: RunBatchSettings) -> int:
    """Exit status: 0 every request has its line in OUT, 1 the file is wrong (a sentence on stderr), 70 the engine died,
    130 stopped by ^C."""
    if sentence := unreadable(settings.requests):
        raise RequestsError(sentence)
    work = settings.out.with_name(settings.out.name + ".partial")
    if settings.out.exists():
        if not work.exists():
            raise RequestsError(f"{settings.out} exists already; remove it, or name another file")
        shutil.rmtree(work)  # the last run was killed with nothing left to do
        return exits.DONE
    if not settings.out.parent.is_dir():
        raise RequestsError(f"{settings.out} cannot be written: there is no folder {settings.out.parent}; make it")
    is_new = not work.exists()
    folder = BatchFolder(work)
    try:
        store = Store(folder)
        batch = _begun(store, settings.requests, work)
        status = asyncio.run(_run(settings, store, batch))
    except RequestsError:
        if is_new:
            shutil.rmtree(work)
        raise
    except KeyboardInterrupt:
        fail("run-batch", "stopped; the same command goes on with what is missing")
        return exits.INTERRUPTED
    finally:
        folder.close()
    if status == exits.DONE:
        shutil.rmtree(work)
    return status


def _begun(store: Store, requests: Path, work: Path) -> BatchRecord:
    """The batch that is left to be run, or a new one. Raises RequestsError."""
    with requests.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    for batch in store.unfinished():
        if batch.completion_window != digest:
            raise RequestsError(
                f"{work} was begun with other requests than those of {requests}; remove it to begin anew"
            )
        return batch
    found = read_input(requests, None, _MAX_LINE_BYTES, max_lines=None)
    if found.errors:
        raise RequestsError(_in_words(requests, found.errors))
    file_id, now = new_file_id(), int(time.time())
    with store.folder.new(file_id) as kept, requests.open("rb") as file:
        size = copied(iter(partial(file.read, 2**20), b""), kept.write)
    store.add_file(FileRecord(file_id, "", requests.name, "batch", size, now, _FOR_EVER))
    batch = BatchRecord(new_batch_id(), "", "", file_id, digest, "null", _FOR_EVER, now, _FOR_EVER)
    store.add_batch(batch)
    store.begin(batch.id, found.lines)
    return batch


def _in_words(requests: Path, errors: list[LineError]) -> str:
    more = f"; and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
    return f"{requests}: " + "; ".join(str(error).removesuffix(".") for error in errors[:_SHOWN]) + more


async def _run(settings: RunBatchSettings, store: Store, batch: BatchRecord) -> int:
    from gptq_api.api.server import load, new_batches
    from gptq_api.edge.auth import Authenticator
    from gptq_api.engine.client import EngineClient

    started = time.monotonic()
    own = EngineSettings.model_fields.keys() | {"accept_any_model", "model_alias", "strict_params"}
    as_served = Settings(**{name: getattr(settings, name) for name in own})
    engine, auth = EngineClient(as_served, _RESTARTS), Authenticator()
    service, (app, middlewares) = await load(
        as_served, engine, auth, lambda: asyncio.to_thread(_prepared, as_served, auth)
    )
    app.state.service = service
    batches = new_batches(store, service, middlewares, _FOR_EVER, finish=partial(_finish, settings.out))
    try:
        log.info(engine.ready.description)
        await batches.start()
        ended, dead = asyncio.ensure_future(batches.ended(batch.id)), asyncio.ensure_future(engine.wait_dead())
        now = batch
        while not (ended.done() or dead.done()):
            await asyncio.wait({ended, dead}, timeout=_PROGRESS_S, return_when=asyncio.FIRST_COMPLETED)
            now = await batches.do(lambda store: store.batch(batch.id) or batch)
            log.info(f"{now.completed + now.failed} of {now.total} requests answered", failed=now.failed)
        dead.cancel()
        if not ended.done():
            fail("run-batch", f"{engine.why_dead}; the same command goes on with what is missing")
            return exits.ENGINE_DEAD
        answer(
            f"{now.total} requests answered: {settings.out}",
            failed=now.failed,
            seconds=round(time.monotonic() - started, 1),
        )
        return exits.DONE
    finally:
        await batches.stop()
        batches.close()
        service.close()
        await engine.stop()


def _prepared(settings: Settings, auth: Authenticator) -> tuple[FastAPI, ASGIApp]:
    """The application, and it behind what stands around every request."""
    from gptq_api.api.app import build_app
    from gptq_api.api.errors import error_body
    from gptq_api.edge.request_log import RequestMiddleware

    app = build_app(settings, auth)
    return app, RequestMiddleware(app, error_body)


def _finish(out: Path, store: Store, batch: BatchRecord, end: End) -> None:
    """One file, in the order of the requests."""
    with whole_file(out) as file:
        copied(store.output(batch.id, end), file.write)
    store.ended(batch.id, end)
