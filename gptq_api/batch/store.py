"""Files and batches in SQLite: what a server knows of them after it was killed.

An answer is one row, written by one INSERT, and its key is the line it answers: so it is there or not, and never twice.
What has no answer is asked again. Contents of files lie in the folder; a file is known once its row is there.

For one thread at a time.
"""

from __future__ import annotations

import dataclasses
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from gptq_api.batch.folder import BatchFolder, BatchFolderError, copied
from gptq_api.batch.lines import InputLine
from gptq_api.batch.records import UNFINISHED_STATUSES, BatchRecord, End, FileRecord, ListPage, PendingLine
from gptq_api.batch.spelled import UNFINISHED, unanswered
from gptq_api.batch.tally import BatchTallies, BatchTally

VERSION = 1
FORGOTTEN_S = 30 * 86400
"""how long a batch that has ended is known"""
_SCHEMA = """
CREATE TABLE files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, filename TEXT NOT NULL,
    purpose TEXT NOT NULL, bytes INTEGER NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL
);
CREATE TABLE batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, endpoint TEXT NOT NULL,
    input_file_id TEXT NOT NULL, completion_window TEXT NOT NULL, metadata TEXT NOT NULL,
    output_seconds INTEGER NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL, status TEXT NOT NULL,
    in_progress_at INTEGER, finalizing_at INTEGER, completed_at INTEGER, failed_at INTEGER, expired_at INTEGER,
    cancelling_at INTEGER, cancelled_at INTEGER, output_file_id TEXT, error_file_id TEXT, errors TEXT,
    total INTEGER NOT NULL, completed INTEGER NOT NULL, failed INTEGER NOT NULL, answer_bytes INTEGER NOT NULL
);
CREATE TABLE lines (
    batch_id TEXT NOT NULL, number INTEGER NOT NULL, custom_id TEXT NOT NULL, url TEXT NOT NULL,
    offset INTEGER NOT NULL, size INTEGER NOT NULL, deaths INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (batch_id, number)
) WITHOUT ROWID;
CREATE TABLE answers (
    batch_id TEXT NOT NULL, number INTEGER NOT NULL, good INTEGER NOT NULL, line BLOB NOT NULL,
    PRIMARY KEY (batch_id, number)
);
CREATE INDEX files_of ON files (owner, seq);
CREATE INDEX batches_of ON batches (owner, seq);
"""
_FILE = ", ".join(field.name for field in dataclasses.fields(FileRecord))
_BATCH = ", ".join(field.name for field in dataclasses.fields(BatchRecord))
_RUNNING = "status IN ({})".format(", ".join(f"'{status}'" for status in UNFINISHED_STATUSES))
_WITHOUT_ANSWER = "NOT EXISTS (SELECT 1 FROM answers a WHERE a.batch_id = l.batch_id AND a.number = l.number)"

T = TypeVar("T")


class Store:
    def __init__(self, folder: BatchFolder) -> None:
        """Raises BatchFolderError where there is something else, or what a newer version wrote."""
        self.folder = folder
        self.uploading = 0
        """bytes of files that are on their way and have no row yet"""
        self.num_completed, self.num_failed = 0, 0
        """requests that were answered since this was opened, well and otherwise"""
        try:
            self._db = sqlite3.connect(folder.database, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                with self._transaction():
                    for statement in _SCHEMA.split(";"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version = {VERSION}")
        except sqlite3.Error as error:
            raise BatchFolderError(
                f"{folder.database} cannot be used: {error}; move it away, or name another folder"
            ) from None
        if version > VERSION:
            raise BatchFolderError(f"{folder.database} is of a newer version of gptq-api; name another folder")
        self._tallies = BatchTallies(self._db)
        folder.keep_only(file_id for (file_id,) in self._db.execute("SELECT id FROM files"))

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def num_bytes(self) -> int:
        """That files and answers take, those on their way included."""
        (files,) = self._db.execute("SELECT coalesce(sum(bytes), 0) FROM files").fetchone()
        (answers,) = self._db.execute("SELECT coalesce(sum(answer_bytes), 0) FROM batches").fetchone()
        return int(files + answers + self.uploading)

    def tallies(self) -> dict[str, BatchTally]:
        """Of the batches by their status."""
        return self._tallies.read()

    # Files

    def add_file(self, file: FileRecord) -> None:
        """Its content is in the folder."""
        self._insert("files", file)

    def file(self, file_id: str, owner: str) -> FileRecord | None:
        """None where there is none, or it is somebody else's, or is too old."""
        row = self._db.execute(
            f"SELECT {_FILE} FROM files WHERE id = ? AND owner = ? AND expires_at > ?", (file_id, owner, _now())
        ).fetchone()
        return None if row is None else FileRecord(*row)

    def files(self, owner: str, page: ListPage, purpose: str | None = None) -> tuple[list[FileRecord], bool] | None:
        """A page, and whether there are more behind it; None where there is no `page.after`."""
        also, values = ("AND purpose = ?", [purpose]) if purpose is not None else ("", [])
        return self._page("files", _FILE, FileRecord, owner, page, f"AND expires_at > {_now()} {also}", values)

    def used_by(self, file_id: str) -> str | None:
        """The id of a batch that still reads the file."""
        row = self._db.execute(f"SELECT id FROM batches WHERE input_file_id = ? AND {_RUNNING}", (file_id,)).fetchone()
        return None if row is None else str(row[0])

    def delete_file(self, file_id: str) -> None:
        self._db.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self.folder.remove(file_id)

    def forget(self) -> None:
        """Files that are too old and that no batch reads, and batches that ended long ago."""
        reads = f"SELECT input_file_id FROM batches WHERE {_RUNNING}"
        old = self._db.execute(f"SELECT id FROM files WHERE expires_at <= ? AND id NOT IN ({reads})", (_now(),))
        for (file_id,) in old.fetchall():
            self.delete_file(file_id)
        ended = (
            "max(coalesce(completed_at, 0), coalesce(failed_at, 0), coalesce(expired_at, 0), coalesce(cancelled_at, 0))"
        )
        self._db.execute(f"DELETE FROM batches WHERE NOT {_RUNNING} AND {ended} < ?", (_now() - FORGOTTEN_S,))

    # Batches

    def add_batch(self, batch: BatchRecord) -> None:
        self._insert("batches", batch)

    def batch(self, batch_id: str, owner: str | None = None) -> BatchRecord | None:
        """None where there is none, or it is not the owner's; `owner` None: whoever it belongs to."""
        row = self._db.execute(
            f"SELECT {_BATCH} FROM batches WHERE id = ? AND (? IS NULL OR owner = ?)", (batch_id, owner, owner)
        ).fetchone()
        return None if row is None else BatchRecord(*row)

    def batches(self, owner: str, page: ListPage) -> tuple[list[BatchRecord], bool] | None:
        """As `files`."""
        return self._page("batches", _BATCH, BatchRecord, owner, page)

    def unfinished(self, owner: str | None = None) -> list[BatchRecord]:
        """In the order of their creation; `owner` None: of all."""
        rows = self._db.execute(
            f"SELECT {_BATCH} FROM batches WHERE {_RUNNING} AND (? IS NULL OR owner = ?) ORDER BY seq", (owner, owner)
        )
        return [BatchRecord(*row) for row in rows]

    def fail(self, batch_id: str, errors: str) -> None:
        """Its file is wrong. `errors`: JSON."""
        self._db.execute(
            "UPDATE batches SET status = 'failed', failed_at = ?, errors = ? WHERE id = ? AND status = 'validating'",
            (_now(), errors, batch_id),
        )

    def begin(self, batch_id: str, lines: Iterable[InputLine]) -> None:
        """Its file is right: these are its requests. Nothing where it was cancelled meanwhile."""
        with self._transaction():
            done = self._db.execute(
                "UPDATE batches SET status = 'in_progress', in_progress_at = ? WHERE id = ? AND status = 'validating'",
                (_now(), batch_id),
            )
            if not done.rowcount:
                return
            self._db.executemany(
                "INSERT INTO lines (batch_id, number, custom_id, url, offset, size) VALUES (?, ?, ?, ?, ?, ?)",
                ((batch_id, line.number, line.custom_id, line.url, line.offset, line.size) for line in lines),
            )
            self._db.execute(
                "UPDATE batches SET total = (SELECT count(*) FROM lines WHERE batch_id = ?) WHERE id = ?",
                (batch_id, batch_id),
            )

    def cancel(self, batch_id: str) -> bool:
        """Whether it was on its way."""
        done = self._db.execute(
            "UPDATE batches SET status = 'cancelling', cancelling_at = ? "
            "WHERE id = ? AND status IN ('validating', 'in_progress')",
            (_now(), batch_id),
        )
        return bool(done.rowcount)

    def pending(self, batch_id: str, behind: int, most: int, most_bytes: int) -> list[PendingLine]:
        """The next requests without an answer, behind line number `behind`: at least one where there is one, and not
        many more bytes than `most_bytes`."""
        rows = self._db.execute(
            "SELECT number, custom_id, url, offset, size, deaths FROM lines l "
            f"WHERE batch_id = ? AND number > ? AND {_WITHOUT_ANSWER} ORDER BY number LIMIT ?",
            (batch_id, behind, most),
        )
        found, size = list[PendingLine](), 0
        for row in rows:
            found.append(PendingLine(*row))
            size += found[-1].size
            if size >= most_bytes:
                break
        rows.close()
        return found

    def answer(self, batch_id: str, number: int, *, good: bool, line: bytes) -> None:
        """The answer to a request, and that it has one; nothing where it has one already."""
        if not self._answer(batch_id, number, good=good, line=line):
            return
        if good:
            self.num_completed += 1
        else:
            self.num_failed += 1

    def _answer(self, batch_id: str, number: int, *, good: bool, line: bytes) -> bool:
        """Whether it had none."""
        with self._transaction():
            done = self._db.execute(
                "INSERT OR IGNORE INTO answers (batch_id, number, good, line) VALUES (?, ?, ?, ?)",
                (batch_id, number, good, line),
            )
            if done.rowcount:
                column = "completed" if good else "failed"
                self._db.execute(
                    f"UPDATE batches SET {column} = {column} + 1, answer_bytes = answer_bytes + ? WHERE id = ?",
                    (len(line), batch_id),
                )
            return bool(done.rowcount)

    def died(self, batch_id: str, number: int) -> int:
        """The engine died over a request, or beside it; how many have by now."""
        self._db.execute("UPDATE lines SET deaths = deaths + 1 WHERE batch_id = ? AND number = ?", (batch_id, number))
        (deaths,) = self._db.execute(
            "SELECT deaths FROM lines WHERE batch_id = ? AND number = ?", (batch_id, number)
        ).fetchone()
        return int(deaths)

    def finalizing(self, batch_id: str) -> None:
        self._db.execute(
            "UPDATE batches SET status = 'finalizing', finalizing_at = ? WHERE id = ? AND status = 'in_progress'",
            (_now(), batch_id),
        )

    def output(self, batch_id: str, end: End, good: bool | None = None) -> Iterator[bytes]:
        """The line of every request in the order of the input, those without an answer included; `good`: of those with
        a good answer, or of the others."""
        which = {None: "", True: "AND a.good", False: "AND NOT coalesce(a.good, 0)"}[good]
        rows = self._db.execute(
            "SELECT l.custom_id, a.line FROM lines l LEFT JOIN answers a USING (batch_id, number) "
            f"WHERE batch_id = ? {which} ORDER BY l.number",
            (batch_id,),
        )
        for custom_id, line in rows:
            yield unanswered(new_line_id(), custom_id, UNFINISHED[end]) if line is None else line

    def finish(self, batch: BatchRecord, end: End) -> None:
        """Its files are made of the answers, which are not kept besides. Whoever is killed here does it again. Raises
        UserError where a file cannot be written."""
        made = dict[bool, FileRecord]()
        try:
            for good in (True, False):
                if (file := self._output_file(batch, end, good)) is not None:
                    made[good] = file
            self.ended(batch.id, end, made)
        except BaseException:
            for file in made.values():
                self.folder.remove(file.id)
            raise

    def ended(self, batch_id: str, end: End, files: Mapping[bool, FileRecord] | None = None) -> None:
        """It has ended, and its answers are in files, of which those with good ones and the others may be known."""
        made = files or {}
        ids = {good: file.id for good, file in made.items()}
        with self._transaction():
            for file in made.values():
                self._insert("files", file)
            self._db.execute(
                f"UPDATE batches SET status = ?, {end}_at = ?, output_file_id = ?, error_file_id = ?, "
                "answer_bytes = 0 WHERE id = ?",
                (end, _now(), ids.get(True), ids.get(False), batch_id),
            )
            self._db.execute("DELETE FROM answers WHERE batch_id = ?", (batch_id,))
            self._db.execute("DELETE FROM lines WHERE batch_id = ?", (batch_id,))

    def _output_file(self, batch: BatchRecord, end: End, good: bool) -> FileRecord | None:
        """None where there is no line for it."""
        lines = self.output(batch.id, end, good)
        first = next(lines, None)
        if first is None:
            return None
        file_id, now = new_file_id(), _now()
        with self.folder.new(file_id) as file:
            size = copied([first], file.write) + copied(lines, file.write)
        name = f"{batch.id}_{'output' if good else 'error'}.jsonl"
        return FileRecord(file_id, batch.owner, name, "batch_output", size, now, now + batch.output_seconds)

    def _insert(self, table: str, record: FileRecord | BatchRecord) -> None:
        values = dataclasses.asdict(record)
        names, marks = ", ".join(values), ", ".join("?" * len(values))
        self._db.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", list(values.values()))

    def _page(
        self,
        table: str,
        columns: str,
        make: Callable[..., T],
        owner: str,
        page: ListPage,
        also: str = "",
        values: list[Any] | None = None,
    ) -> tuple[list[T], bool] | None:
        sign, order = ("<", "DESC") if page.newest_first else (">", "ASC")
        place = ""
        if page.after is not None:
            found = self._db.execute(
                f"SELECT seq FROM {table} WHERE id = ? AND owner = ?", (page.after, owner)
            ).fetchone()
            if found is None:
                return None
            place = f"AND seq {sign} {found[0]}"
        rows = self._db.execute(
            f"SELECT {columns} FROM {table} WHERE owner = ? {also} {place} ORDER BY seq {order} LIMIT ?",
            (owner, *(values or []), page.limit + 1),
        ).fetchall()
        return [make(*row) for row in rows[: page.limit]], len(rows) > page.limit


def _now() -> int:
    return int(time.time())


def new_file_id() -> str:
    return f"file-{secrets.token_hex(12)}"


def new_batch_id() -> str:
    return f"batch_{secrets.token_hex(12)}"


def new_line_id() -> str:
    return f"batch_req_{secrets.token_hex(12)}"
