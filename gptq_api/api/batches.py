"""The batches of a server: the thread in which their store is asked, and a task for each that has not ended."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, TypeVar

import structlog
from fastapi import Depends, Request
from starlette.types import ASGIApp

from gptq_api.api.batch_run import BatchRun
from gptq_api.api.service import Service
from gptq_api.batch.records import BatchRecord, End
from gptq_api.batch.store import Store
from gptq_api.batch.tally import BatchLoad

log = structlog.get_logger()

T = TypeVar("T")
FORGET_S = 60.0
"""between two looks at what is too old"""
ROOM_S = 1.0
"""for which it is taken as known whether there is room on the disk"""


class Batches:
    def __init__(
        self,
        store: Store,
        service: Service,
        app: ASGIApp,
        most_bytes: int,
        finish: Callable[[Store, BatchRecord, End], None] = Store.finish,
    ) -> None:
        """`app`: with its middlewares; `most_bytes`: that files and answers may take; `finish`: makes files of a
        batch's answers, and tells the store that it has ended."""
        self.service, self.app, self.most_bytes = service, app, most_bytes
        self.folder, self.finish = store.folder, finish
        engine = service.engine
        self.num_at_once = max(1, min(engine.ready.max_num_seqs, engine.places.most // 2))
        """half of the places are for those that somebody waits for"""
        self.slots = asyncio.Semaphore(self.num_at_once)
        self.num_running = 0
        self._store, self._tallies = store, store.tallies()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._turns: dict[str, asyncio.Lock] = {}
        self._runs: dict[str, BatchRun] = {}
        self._tasks = set[asyncio.Task[None]]()
        self._room, self._room_until = True, 0.0

    async def do(self, work: Callable[[Store], T]) -> T:
        """What `work` returns, in the thread of the store. Raises what it raises."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._done, work)

    def _done(self, work: Callable[[Store], T]) -> T:
        try:
            return work(self._store)
        finally:
            self._tallies = self._store.tallies()  # so that who asks how many there are need not wait for this thread

    def load(self) -> BatchLoad:
        """As of the last change."""
        return BatchLoad(self._tallies, self.num_running, self._store.num_completed, self._store.num_failed)

    def turn_of(self, owner: str) -> asyncio.Lock:
        return self._turns.setdefault(owner, asyncio.Lock())

    @contextlib.contextmanager
    def uploading(self, num_bytes: int) -> Iterator[None]:
        """Around a file on its way, which takes so much at most."""
        self._store.uploading += num_bytes
        try:
            yield
        finally:
            self._store.uploading -= num_bytes

    async def num_free(self) -> int:
        """Bytes that files and answers may still take."""
        return await self.do(lambda store: min(self.most_bytes - store.num_bytes(), store.folder.num_free()))

    async def has_room(self) -> bool:
        now = asyncio.get_running_loop().time()
        if now >= self._room_until:
            had, self._room = self._room, await self.num_free() > 0
            self._room_until = now + ROOM_S
            if had and not self._room:
                log.warning("batches wait, for their folder is full: delete files, or raise --batch-disk-mib")
        return self._room

    async def start(self) -> None:
        """Go on with what has not ended."""
        unfinished = await self.do(lambda store: store.unfinished())
        if unfinished:
            log.info("batches to answer", num=len(unfinished))
        for batch in unfinished:
            self.begin(batch)
        self._start(self._forget())

    def begin(self, batch: BatchRecord) -> None:
        """The store has it. Nothing where it runs."""
        if batch.id in self._runs:
            return
        self._runs[batch.id] = run = BatchRun(self, batch)
        self._start(self._run(run))

    def cancel(self, batch_id: str) -> None:
        """The store says that it is cancelled."""
        if (run := self._runs.get(batch_id)) is not None:
            run.cancel()

    async def ended(self, batch_id: str) -> None:
        """Returns when it has ended."""
        while batch_id in self._runs:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)

    async def stop(self) -> None:
        """What has not ended goes on when the server is started again."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def close(self) -> None:
        self._thread.submit(self._store.close)
        self._thread.shutdown()

    def _start(self, work: object) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, run: BatchRun) -> None:
        try:
            await run.run()
        finally:
            del self._runs[run.id]

    async def _forget(self) -> None:
        while True:
            with contextlib.suppress(sqlite3.Error, OSError):  # it is tried again
                await self.do(lambda store: store.forget())
            await asyncio.sleep(FORGET_S)


async def _batches(request: Request) -> Batches:
    batches: Batches = request.app.state.batches
    return batches


BatchesDep = Annotated[Batches, Depends(_batches)]
