"""One batch from its file to its answers: each line is a request that comes by the same routes as any other, behind
those that somebody waits for.

What an answer tells to try again (429, 503) is tried again and is no answer. A line over which engines die is asked
alone, so that it takes no others with it, and is given up after MAX_DEATHS.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import structlog
from starlette.types import ASGIApp

from gptq_api.api import in_process
from gptq_api.api.in_process import Answer
from gptq_api.api.service import Service
from gptq_api.batch.lines import body_of, read_input
from gptq_api.batch.records import BatchRecord, End, PendingLine
from gptq_api.batch.spelled import answered
from gptq_api.batch.store import Store, new_line_id
from gptq_api.errors import UserError

log = structlog.get_logger()

T = TypeVar("T")
LATER = (401, 408, 429, 503, 529)
"""statuses that are no answer: there is no room, no engine or, for now, no such key"""
MAX_DEATHS = 3
"""engines that may die over a line"""
SHORTEST_WAIT_S, LONGEST_WAIT_S = 0.05, 10.0
RETRY_S = 5.0
"""after something failed that is not the batch's fault, such as a disk that is full"""
SPARE_S = 0.2
"""between two looks at whether there is room for a line"""
READ_AHEAD, READ_AHEAD_BYTES = 64, 8 * 2**20
"""lines that are read at a time"""


class Desk(Protocol):
    """What all batches share."""

    service: Service
    app: ASGIApp
    slots: asyncio.Semaphore
    """for lines that are being answered"""
    num_running: int
    """of such lines"""
    finish: Callable[[Store, BatchRecord, End], None]
    """makes files of a batch's answers, and tells the store that it has ended"""

    async def do(self, work: Callable[[Store], T]) -> T: ...

    def turn_of(self, owner: str) -> asyncio.Lock:
        """An owner's batches come one after the other."""

    async def has_room(self) -> bool:
        """Whether more answers may be kept."""


@dataclass(slots=True, frozen=True)
class _LineAsked:
    line: PendingLine
    body: bytes


class BatchRun:
    def __init__(self, desk: Desk, batch: BatchRecord) -> None:
        self.id, self.owner = batch.id, batch.owner
        self._desk = desk
        self._expires_at = batch.expires_at
        self._cancelled = asyncio.Event()
        self._stopped = False
        self._suspects = list[_LineAsked]()  # lines over which, or beside which, an engine died

    def cancel(self) -> None:
        """The store says that it is cancelled."""
        self._cancelled.set()

    async def run(self) -> None:
        """Until it has ended, or for as long as it is not cancelled."""
        while True:
            try:
                return await self._go_on()
            except Exception as error:
                if (why := _outside(error)) is None:
                    log.exception("a batch failed by a bug; it is tried again", batch=self.id)
                else:
                    log.error(f"batch {self.id} waits: {why}")
            await asyncio.sleep(RETRY_S)

    async def _go_on(self) -> None:
        batch = await self._now()
        if batch.status == "validating":
            await self._validate(batch)
            batch = await self._now()
        if batch.status == "in_progress":
            if await self._answer_in_time(batch):
                await self._desk.do(lambda store: store.finalizing(self.id))
            batch = await self._now()
        if batch.status == "failed":
            log.info(f"batch {self.id} failed: its file is wrong")
            return
        ends: dict[str, End] = {"finalizing": "completed", "cancelling": "cancelled"}
        end = ends.get(batch.status, "expired")
        await self._desk.do(lambda store: self._desk.finish(store, batch, end))
        log.info(f"batch {self.id} {end}", completed=batch.completed, failed=batch.failed, of=batch.total)

    async def _now(self) -> BatchRecord:
        batch = await self._desk.do(lambda store: store.batch(self.id))
        assert batch is not None
        return batch

    async def _validate(self, batch: BatchRecord) -> None:
        path = await self._path(batch)
        limit = self._desk.service.max_body_bytes
        try:
            found = await asyncio.to_thread(
                read_input, path, batch.endpoint or None, limit, lambda: self._cancelled.is_set() or self._stopped
            )
        except asyncio.CancelledError:
            self._stopped = True
            raise
        if found.errors:
            errors = msgspec.json.encode([error.told() for error in found.errors]).decode()
            await self._desk.do(lambda store: store.fail(self.id, errors))
            return
        log.info(f"batch {self.id}: {len(found.lines)} requests")
        await self._desk.do(lambda store: store.begin(self.id, found.lines))

    async def _path(self, batch: BatchRecord) -> Path:
        return await self._desk.do(lambda store: store.folder.file(batch.input_file_id))

    async def _answer_in_time(self, batch: BatchRecord) -> bool:
        """Whether all lines have answers; otherwise it was cancelled, or its window has ended."""
        answering = asyncio.ensure_future(self._answer(batch))
        cancelled = asyncio.ensure_future(self._cancelled.wait())
        try:
            left_s = max(0.0, self._expires_at - time.time())
            await asyncio.wait({answering, cancelled}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            answering.cancel()
            cancelled.cancel()
            await asyncio.gather(answering, cancelled, return_exceptions=True)
        if answering.cancelled():
            return False
        answering.result()
        return True

    async def _answer(self, batch: BatchRecord) -> None:
        async with self._desk.turn_of(self.owner), asyncio.TaskGroup() as group:
            path, behind = await self._path(batch), 0
            running = set[asyncio.Task[None]]()
            next_lines = partial(_next_lines, batch.id, path)
            while asked := await self._desk.do(partial(next_lines, behind)):
                for item in asked:
                    behind = item.line.number
                    if item.line.deaths:
                        self._suspects.append(item)
                    else:
                        await self._room()
                        task = group.create_task(self._ask_in_slot(item))
                        running.add(task)
                        task.add_done_callback(running.discard)
                    await self._ask_suspects(running)
            while running:
                await asyncio.wait(running)
                await self._ask_suspects(running)

    async def _ask_suspects(self, running: set[asyncio.Task[None]]) -> None:
        """One by one, beside nobody of this batch."""
        while self._suspects:
            if running:
                await asyncio.wait(running)
                continue
            suspect = self._suspects.pop()
            await self._room()
            await self._ask_in_slot(suspect)

    async def _room(self) -> None:
        """Returns with a slot, when there is something left of the key's limits, and of the disk."""
        while not (self._has_spare() and await self._desk.has_room()):  # noqa: ASYNC110  (a clock and a disk)
            await asyncio.sleep(SPARE_S)
        await self._desk.slots.acquire()

    def _has_spare(self) -> bool:
        caller = self._desk.service.auth.in_background(self.owner)
        return caller is not None and (caller.account is None or caller.account.has_spare(time.monotonic()))

    async def _ask_in_slot(self, asked: _LineAsked) -> None:
        self._desk.num_running += 1
        try:
            await self._ask(asked)
        finally:
            self._desk.num_running -= 1
            self._desk.slots.release()

    async def _ask(self, asked: _LineAsked) -> None:
        line, desk = asked.line, self._desk
        while True:
            answer = await in_process.post(desk.app, line.url, asked.body, self.owner)
            if answer.error == "engine_dead":
                deaths = await desk.do(lambda store: store.died(self.id, line.number))
                if deaths < MAX_DEATHS:
                    self._suspects.append(replace(asked, line=replace(line, deaths=deaths)))
                    return
            elif answer.status in LATER:
                await asyncio.sleep(_wait_s(answer))
                continue
            await self._keep(line, answer)
            return

    async def _keep(self, line: PendingLine, answer: Answer) -> None:
        request_id, good = answer.headers["x-request-id"], answer.status == 200
        told = answered(new_line_id(), line.custom_id, answer.status, request_id, answer.body)
        await self._desk.do(lambda store: store.answer(self.id, line.number, good=good, line=told))


def _next_lines(batch_id: str, path: Path, behind: int, store: Store) -> list[_LineAsked]:
    lines = store.pending(batch_id, behind, READ_AHEAD, READ_AHEAD_BYTES)
    asked = list[_LineAsked]()
    if lines:
        with path.open("rb") as file:
            for line in lines:
                file.seek(line.offset)
                asked.append(_LineAsked(line, body_of(file.read(line.size))))
    return asked


def _wait_s(answer: Answer) -> float:
    """As the answer says, within bounds."""
    seconds = float(answer.headers.get("retry-after-ms", 0)) / 1000 or float(answer.headers.get("retry-after", 1))
    return min(max(seconds, SHORTEST_WAIT_S), LONGEST_WAIT_S)


def _outside(error: BaseException) -> str | None:
    """Why, where it comes of the disk and not of us."""
    if isinstance(error, BaseExceptionGroup):
        reasons: list[Any] = [_outside(one) for one in error.exceptions]
        return None if None in reasons else "; ".join(sorted(set(reasons)))
    return str(error) if isinstance(error, (sqlite3.Error, OSError, UserError)) else None
