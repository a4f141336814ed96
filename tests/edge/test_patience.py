"""The clock of a client's time: it runs while somebody is waited for, and not while the event loop stands still."""

from __future__ import annotations

import asyncio
import time

from gptq_api.edge.patience import MOST_S, TICK_S, Patience


def test_a_loop_that_stands_still_takes_nobodys_time() -> None:
    async def test() -> None:
        patience = Patience()
        before = patience.now()
        await asyncio.sleep(2 * TICK_S)
        assert patience.now() == before, "nobody is waited for"
        patience.begin()
        began = patience.now()
        time.sleep(1)
        assert patience.now() - began <= MOST_S
        await asyncio.sleep(0)
        patience.begin()
        time.sleep(1)
        assert patience.now() - began <= 2 * MOST_S
        patience.end()
        while patience.now() - began < 1:  # it goes on
            await asyncio.sleep(TICK_S)
        patience.end()
        ended = patience.now()
        await asyncio.sleep(2 * TICK_S)
        assert patience.now() == ended

    asyncio.run(asyncio.wait_for(test(), 60))
