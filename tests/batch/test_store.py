"""What the database of batches keeps, whatever happens to the process that writes it."""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import astuple
from pathlib import Path

import pytest

from gptq_api.batch.folder import BatchFolder, BatchFolderError
from gptq_api.batch.lines import InputLine, read_input
from gptq_api.batch.records import STATUSES, BatchRecord, FileRecord, ListPage
from gptq_api.batch.store import FORGOTTEN_S, Store, new_batch_id, new_file_id
from tests.support.batches import counting, files_in, jsonl

LATER = 2**40


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    folder = BatchFolder(tmp_path / "b")
    store = Store(folder)
    yield store
    store.close()
    folder.close()


def kept_file(store: Store, owner: str = "", num: int = 10, expires_at: int = LATER) -> FileRecord:
    data = jsonl(counting(num))
    record = FileRecord(new_file_id(), owner, "in.jsonl", "batch", len(data), 1, expires_at)
    with store.folder.new(record.id) as file:
        file.write(data)
    store.add_file(record)
    return record


def begun(store: Store, owner: str = "", num: int = 10) -> BatchRecord:
    file = kept_file(store, owner, num)
    batch = BatchRecord(new_batch_id(), owner, "", file.id, "24h", "null", 3600, 1, LATER)
    store.add_batch(batch)
    store.begin(batch.id, read_input(store.folder.file(file.id), None, 2**20).lines)
    found = store.batch(batch.id)
    assert found is not None and found.total == num
    return found


def validating(store: Store) -> BatchRecord:
    batch = BatchRecord(new_batch_id(), "", "", kept_file(store).id, "24h", "null", 3600, 1, LATER)
    store.add_batch(batch)
    return batch


def reopened(store: Store) -> Store:
    store.close()
    store.folder.close()
    return Store(BatchFolder(store.folder.path))


def test_an_answer_is_there_once_and_its_line_is_not_asked_again(store: Store) -> None:
    batch = begun(store)
    for number in (3, 1, 3, 1, 1):
        store.answer(batch.id, number, good=True, line=b"first\n")
    store.answer(batch.id, 3, good=False, line=b"second\n")
    now = store.batch(batch.id)
    assert now is not None and (now.completed, now.failed) == (2, 0) and now.answer_bytes == 12
    pending = store.pending(batch.id, 0, 100, 2**20)
    assert [line.number for line in pending] == [2, 4, 5, 6, 7, 8, 9, 10]
    assert [line.number for line in store.pending(batch.id, 4, 2, 2**20)] == [5, 6]
    assert [line.number for line in store.pending(batch.id, 0, 100, 1)] == [2], "one at least"
    store.finalizing(batch.id)
    store.finish(now, "expired")
    done = store.batch(batch.id)
    assert done is not None and done.status == "expired" and done.answer_bytes == 0
    output = store.folder.file(str(done.output_file_id)).read_bytes()
    assert output == b"first\nfirst\n"
    errors = [json.loads(line) for line in store.folder.file(str(done.error_file_id)).read_text().splitlines()]
    assert len(errors) == 8 and {line["response"] for line in errors} == {None}


def test_a_process_that_is_killed_anywhere_leaves_whole_answers(tmp_path: Path) -> None:
    """Killed while it writes answers one after the other, and the files of the batch."""
    code = """
import sys
from pathlib import Path
from tests.batch.test_store import *
store = Store(BatchFolder(Path(sys.argv[1])))
batch = (store.unfinished() or [None])[0] or begun(store, num=3000)
for line in store.pending(batch.id, 0, 3000, 2**30):
    store.answer(batch.id, line.number, good=line.number % 2 == 0, line=b"%d\\n" % line.number)
    print("answered", line.number, flush=True)
store.finish(store.batch(batch.id), "completed")
print("done", flush=True)
"""
    told = 0
    for stop_at in (700, 1500, 2990, None):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "b")], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("answered") and line.endswith("\n"):  # the last one may be cut off as well
                told = max(told, int(line.split()[1]))
            if stop_at is not None and told >= stop_at:
                process.kill()
        process.wait()
    assert process.returncode == 0
    folder = BatchFolder(tmp_path / "b")
    store = Store(folder)
    names = files_in(tmp_path / "b")
    assert len(names) == 3 and not store.unfinished()
    found = store.files("", ListPage())
    assert found is not None and {file.id for file in found[0]} == names
    by_name = {file.filename.rpartition("_")[2]: store.folder.file(file.id).read_text().split() for file in found[0]}
    assert by_name["output.jsonl"] == [str(number) for number in range(2, 3001, 2)]
    assert by_name["error.jsonl"] == [str(number) for number in range(1, 3001, 2)]
    store.close()
    folder.close()


def test_what_was_half_done_is_removed_and_what_was_not_goes_on(tmp_path: Path) -> None:
    folder = BatchFolder(tmp_path / "b")
    store = Store(folder)
    batch = begun(store)
    folder.file("file-of-nobody").write_bytes(b"x")
    folder.file("file-of-nobody.part").write_bytes(b"x")
    store.close()
    folder.close()
    folder = BatchFolder(tmp_path / "b")
    again = Store(folder)
    assert files_in(tmp_path / "b") == {batch.input_file_id}
    assert [found.id for found in again.unfinished()] == [batch.id]
    again.close()
    folder.close()


def test_cancelled_before_its_lines_were_known(store: Store) -> None:
    file = kept_file(store)
    batch = BatchRecord(new_batch_id(), "", "", file.id, "24h", "null", 3600, 1, LATER)
    store.add_batch(batch)
    assert store.cancel(batch.id) and not store.cancel(batch.id)
    store.begin(batch.id, read_input(store.folder.file(file.id), None, 2**20).lines)
    store.fail(batch.id, "[]")
    now = store.batch(batch.id)
    assert now is not None and now.status == "cancelling" and now.total == 0
    store.finish(now, "cancelled")
    now = store.batch(batch.id)
    assert now is not None and now.status == "cancelled" and now.output_file_id is None and now.error_file_id is None


def test_files_and_batches_are_their_owners(store: Store) -> None:
    batch = begun(store, "alice")
    assert store.batch(batch.id, "alice") and store.batch(batch.id, "bob") is None
    assert store.file(batch.input_file_id, "alice") and store.file(batch.input_file_id, "bob") is None
    assert store.files("bob", ListPage()) == ([], False) and store.batches("bob", ListPage()) == ([], False)
    assert store.files("bob", ListPage(after=batch.input_file_id)) is None
    assert [found.id for found in store.unfinished("alice")] == [batch.id] and not store.unfinished("bob")


def test_what_is_too_old_is_forgotten(store: Store) -> None:
    old, batch = kept_file(store, expires_at=5), begun(store)
    store._db.execute("UPDATE files SET expires_at = 5 WHERE id = ?", (batch.input_file_id,))
    assert store.file(old.id, "") is None
    store.forget()
    assert files_in(store.folder.path) == {batch.input_file_id}, "a batch reads it"
    store.finish(batch, "expired")
    store.forget()
    done = store.batch(batch.id)
    assert done is not None and files_in(store.folder.path) == {done.error_file_id}
    ago = 60 + FORGOTTEN_S
    store._db.execute("UPDATE batches SET expired_at = expired_at - ?, created_at = 1", (ago,))
    store.forget()
    assert store.batch(batch.id) is None


def test_deaths_are_counted_by_line(store: Store) -> None:
    batch = begun(store)
    assert [store.died(batch.id, 2), store.died(batch.id, 2), store.died(batch.id, 4)] == [1, 2, 1]
    deaths = {line.number: line.deaths for line in store.pending(batch.id, 0, 100, 2**20)}
    assert {number for number, count in deaths.items() if count} == {2, 4} and deaths[2] == 2


def test_how_much_it_takes(store: Store) -> None:
    assert store.num_bytes() == 0
    batch = begun(store)
    file = store.file(batch.input_file_id, "")
    assert file is not None and store.num_bytes() == file.bytes
    store.answer(batch.id, 1, good=True, line=b"x" * 100)
    store.uploading = 7
    assert store.num_bytes() == file.bytes + 107


def test_a_folder_is_one_process_s(tmp_path: Path) -> None:
    folder = BatchFolder(tmp_path / "b")
    with pytest.raises(BatchFolderError, match="in use by another process"):
        BatchFolder(tmp_path / "b")
    folder.close()
    BatchFolder(tmp_path / "b").close()
    (tmp_path / "file").write_text("")
    with pytest.raises(BatchFolderError, match="cannot be made: Not a directory"):
        BatchFolder(tmp_path / "file" / "b")


def test_a_database_that_is_none_or_of_the_future(tmp_path: Path) -> None:
    folder = BatchFolder(tmp_path / "b")
    folder.database.write_bytes(b"hello" * 1000)
    with pytest.raises(BatchFolderError, match="cannot be used: file is not a database; move it away"):
        Store(folder)
    folder.database.unlink()
    Store(folder).close()
    with sqlite3.connect(folder.database) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(BatchFolderError, match="newer version"):
        Store(folder)
    folder.close()


def counted(store: Store) -> dict[str, tuple[int, int, int, int]]:
    """What a connection that counts all rows finds."""
    with closing(sqlite3.connect(store.folder.database)) as db:
        rows = db.execute("SELECT status, count(*), sum(total), sum(completed), sum(failed) FROM batches GROUP BY 1")
        return {status: tuple(counts) for status, *counts in rows}


def tallied(store: Store) -> dict[str, tuple[int, ...]]:
    told = store.tallies()
    assert tuple(told) == STATUSES
    return {status: astuple(tally) for status, tally in told.items() if tally.num}


CHANGES: list[Callable[[Store, str, int], object]] = [
    lambda store, batch, number: store.answer(batch, number, good=True, line=b"x"),
    lambda store, batch, number: store.answer(batch, number, good=False, line=b"y"),
    lambda store, batch, number: store.cancel(batch),
    lambda store, batch, number: store.finalizing(batch),
    lambda store, batch, number: store.ended(batch, "completed"),
    lambda store, batch, number: store.ended(batch, "expired"),
    lambda store, batch, number: store.fail(batch, "{}"),
    lambda store, batch, number: store.forget(),
]


def test_how_many_there_are_is_known_without_counting_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(BatchFolder(tmp_path / "b"))
    rng = random.Random(7)
    batches = [begun(store, num=rng.randrange(1, 5)).id for _ in range(12)]
    batches += [waiting.id for waiting in (validating(store), validating(store))]
    for turn in range(300):
        monkeypatch.setattr("gptq_api.batch.store._now", lambda turn=turn: 1000 + turn * FORGOTTEN_S // 60)
        rng.choice(CHANGES)(store, rng.choice(batches), rng.randrange(1, 5))
        assert tallied(store) == counted(store)
    assert len(counted(store)) > 1 and sum(tally.num for tally in store.tallies().values()) < len(batches)
    batch = validating(store)
    before = tallied(store)
    with pytest.raises(sqlite3.IntegrityError):
        store.begin(batch.id, [InputLine(1, 0, 1, "a", "/v1/completions")] * 2)
    assert tallied(store) == counted(store) == before, "what was rolled back did not happen"
    again = reopened(store)
    assert tallied(again) == before
    again.close()
    again.folder.close()
