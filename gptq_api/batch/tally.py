"""How many batches there are of each status, and requests in them, kept beside the table of batches by the database
itself: no row is counted again when somebody asks."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from gptq_api.batch.records import STATUSES

_COUNTING = """
PRAGMA temp_store = MEMORY;
CREATE TEMP TABLE tally (status TEXT PRIMARY KEY, num INTEGER, total INTEGER, completed INTEGER, failed INTEGER);
INSERT INTO tally SELECT status, count(*), sum(total), sum(completed), sum(failed) FROM batches GROUP BY status;
CREATE TEMP TRIGGER tally_begun AFTER INSERT ON main.batches BEGIN
    INSERT OR IGNORE INTO tally VALUES (NEW.status, 0, 0, 0, 0);
    UPDATE tally SET num = num + 1, total = total + NEW.total, completed = completed + NEW.completed,
        failed = failed + NEW.failed WHERE status = NEW.status;
END;
CREATE TEMP TRIGGER tally_changed AFTER UPDATE OF status, total, completed, failed ON main.batches BEGIN
    INSERT OR IGNORE INTO tally VALUES (NEW.status, 0, 0, 0, 0);
    UPDATE tally SET num = num - 1, total = total - OLD.total, completed = completed - OLD.completed,
        failed = failed - OLD.failed WHERE status = OLD.status;
    UPDATE tally SET num = num + 1, total = total + NEW.total, completed = completed + NEW.completed,
        failed = failed + NEW.failed WHERE status = NEW.status;
END;
CREATE TEMP TRIGGER tally_forgotten AFTER DELETE ON main.batches BEGIN
    UPDATE tally SET num = num - 1, total = total - OLD.total, completed = completed - OLD.completed,
        failed = failed - OLD.failed WHERE status = OLD.status;
END;
"""


@dataclass(slots=True, frozen=True)
class BatchTally:
    """Of the batches that are known of one status."""

    num: int = 0
    total: int = 0
    """requests; 0 of a batch until its file has been read"""
    completed: int = 0
    """requests with a good answer"""
    failed: int = 0
    """requests with another"""

    @property
    def unanswered(self) -> int:
        return self.total - self.completed - self.failed


@dataclass(slots=True, frozen=True)
class BatchLoad:
    """What a server has to do for batches, and has done."""

    tallies: dict[str, BatchTally]
    """by status, all of them"""
    num_running: int
    """requests that are being answered"""
    num_completed: int
    """requests that got a good answer since the server was started"""
    num_failed: int
    """requests that got another"""

    @property
    def num_waiting(self) -> int:
        """Requests that will be asked. Those of a batch that is cancelled end in their own time, as running."""
        return max(0, self.tallies["in_progress"].unanswered - self.num_running)


class BatchTallies:
    """For the connection that changes the batches, and for as long as that is open."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db, self._changes = db, -1
        self._known: dict[str, BatchTally] = {}
        db.executescript(_COUNTING)

    def read(self) -> dict[str, BatchTally]:
        """By status, all of them."""
        if self._changes != self._db.total_changes:
            rows = self._db.execute("SELECT status, num, total, completed, failed FROM tally")
            found = {status: BatchTally(*counts) for status, *counts in rows}
            self._known = {status: found.get(status, BatchTally()) for status in STATUSES}
            self._changes = self._db.total_changes
        return self._known
