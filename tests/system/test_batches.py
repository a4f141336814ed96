"""/v1/files and /v1/batches by OpenAI's SDK, on a server that is killed, is full, or is asked for what is not the
caller's."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types import Batch

from tests.support.batches import (
    CHAT,
    check_counted,
    client_of,
    count_to,
    counting,
    created,
    ended,
    files_in,
    jsonl,
    lines_of,
    request,
)
from tests.support.server import Server, chat_body, check_error, wait_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("batches") / "made" / "here"


@pytest.fixture(scope="module")
def batch_server(folder: Path) -> Iterator[Server]:
    flags = ("--batch-dir", str(folder), "--batch-file-mib", "1", "--batch-disk-mib", "3")
    with Server("--api-key", "ours,theirs", *flags) as running:
        running.http.headers["authorization"] = "Bearer ours"
        yield running


@pytest.fixture(scope="module")
def client(batch_server: Server) -> OpenAI:
    return client_of(batch_server, "ours")


def upload(server: Server, data: bytes = b"{}", fields: dict[str, str] | None = None) -> httpx.Response:
    files = {"file": ("name.jsonl", data)}
    return server.http.post("/v1/files", files=files, data={"purpose": "batch", **(fields or {})})


def test_a_batch_from_its_file_to_its_answers(client: OpenAI, folder: Path) -> None:
    lines = counting(20)
    lines[5]["body"]["model"] = "nope"
    lines[11]["body"]["temperature"] = "hot"
    batch = created(client, jsonl(lines), metadata={"for": "tests"})
    assert batch.status == "validating" and batch.request_counts is not None and batch.request_counts.total == 0
    batch = ended(client, batch)
    assert batch.status == "completed" and batch.metadata == {"for": "tests"}
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (20, 18, 2)
    times = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    assert times == sorted(times, key=lambda time: time or 0) and batch.expires_at == batch.created_at + 86400
    check_counted([line for i, line in enumerate(lines) if i not in (5, 11)], lines_of(client, batch.output_file_id))
    missing, wrong = lines_of(client, batch.error_file_id)
    assert (missing["custom_id"], missing["response"]["status_code"]) == ("request-5", 404)
    assert missing["response"]["body"]["error"]["code"] == "model_not_found" and missing["error"] is None
    assert (wrong["custom_id"], wrong["response"]["status_code"]) == ("request-11", 400)
    assert wrong["response"]["body"]["error"]["param"] == "temperature" and wrong["response"]["request_id"]
    assert batch.output_file_id is not None
    output = client.files.retrieve(batch.output_file_id)
    assert output.purpose == "batch_output" and output.bytes == len(client.files.content(output.id).content)
    for file_id in (batch.input_file_id, batch.output_file_id, batch.error_file_id):
        assert client.files.delete(str(file_id)).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.content(str(file_id))
    assert not files_in(folder) & {batch.input_file_id, batch.output_file_id, batch.error_file_id}


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/completions", {"prompt": "1, 2,", "max_tokens": 4}),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 4}),
        ("/v1/messages", chat_body(max_tokens=4)),
    ],
)
def test_every_endpoint_answers_as_it_does_otherwise(
    endpoint: Any, body: dict[str, Any], client: OpenAI, batch_server: Server
) -> None:
    body = {**body, "temperature": 0}
    file = client.files.create(file=("a.jsonl", jsonl([request("a", body, endpoint)])), purpose="batch")
    made = client.batches.create(
        input_file_id=file.id,
        endpoint=endpoint,
        completion_window="24h",
    )
    (line,) = lines_of(client, ended(client, made).output_file_id)
    direct = batch_server.post(endpoint, body).json()
    answer = line["response"]["body"]
    assert answer.keys() == direct.keys()
    for name in ("choices", "content", "usage"):
        if name in direct and name != "usage":
            assert answer[name] == direct[name]


def test_bad_lines_are_told_by_their_numbers(client: OpenAI) -> None:
    good = request("good", count_to(3))
    lines = [
        json.dumps(good).encode(),
        b"{not json",
        b"[1]",
        b"",
        json.dumps({**good, "method": "GET", "custom_id": "b"}).encode(),
        json.dumps({**good, "url": "/v1/embeddings", "custom_id": "c"}).encode(),
        json.dumps({**good, "url": "/v1/completions", "custom_id": "d"}).encode(),
        json.dumps(good).encode(),
        json.dumps({"custom_id": "e", "method": "POST", "url": CHAT}).encode(),
        json.dumps(request("f", count_to(3, stream=True))).encode(),
        json.dumps({**good, "custom_id": "g", "temperature": 0}).encode(),
        b"\xff\xfe",
    ]
    batch = ended(client, created(client, b"\n".join(lines)))
    assert batch.status == "failed" and batch.failed_at and batch.errors is not None and batch.errors.data is not None
    found = [(error.line, error.code) for error in batch.errors.data]
    assert found == [
        (2, "invalid_json_line"),
        (3, "invalid_json_line"),
        (5, "invalid_method"),
        (6, "invalid_url"),
        (7, "mismatched_url"),
        (8, "duplicate_custom_id"),
        (9, "missing_required_parameter"),
        (10, "invalid_value"),
        (11, "unknown_parameter"),
        (12, "invalid_json_line"),
    ]
    assert all(error.message and error.message.endswith(".") for error in batch.errors.data)
    assert batch.output_file_id is None and batch.error_file_id is None
    batch = ended(client, created(client, b"\n \n"))
    assert batch.errors is not None and batch.errors.data is not None and batch.errors.data[0].code == "empty_file"


def test_what_belongs_to_one_key_is_not_there_for_another(client: OpenAI, batch_server: Server) -> None:
    batch = ended(client, created(client, jsonl(counting(1))))
    other = client_of(batch_server, "theirs")
    for ask in (
        lambda: other.files.retrieve(batch.input_file_id),
        lambda: other.files.content(str(batch.output_file_id)),
        lambda: other.files.delete(batch.input_file_id),
        lambda: other.batches.retrieve(batch.id),
        lambda: other.batches.cancel(batch.id),
        lambda: other.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"),
    ):
        with pytest.raises(openai.NotFoundError):
            ask()
    assert not other.files.list().data and not other.batches.list().data
    for listing in ("/v1/files", "/v1/batches"):
        after = batch_server.http.get(listing, params={"after": batch.id}, headers={"authorization": "Bearer theirs"})
        check_error(after, 400, "after")
    assert client.files.retrieve(batch.input_file_id).id == batch.input_file_id


def test_lists_come_in_pages(client: OpenAI) -> None:
    made = [created(client, jsonl(counting(1))).id for _ in range(5)]
    first = client.batches.list(limit=2)
    assert first.has_more and [batch.id for batch in first.data] == made[:2:-1]
    assert [batch.id for batch in first][:5] == made[::-1], "the SDK asks for the pages behind it"
    files = client.files.list(limit=3, order="asc", purpose="batch")
    ids = [file.id for file in files]
    assert len(ids) == len(set(ids)) >= 5 and files.has_more
    assert not client.files.list(purpose="vision").data
    for batch_id in made:
        ended(client, client.batches.retrieve(batch_id))


def test_a_batch_that_is_cancelled(client: OpenAI) -> None:
    lines = [request(f"request-{i}", count_to(9, max_tokens=400, ignore_eos=True)) for i in range(3000)]
    batch = created(client, jsonl(lines))
    wait_for(lambda: client.batches.retrieve(batch.id).status == "in_progress", 30)
    with pytest.raises(openai.BadRequestError, match="cancel that first"):
        client.files.delete(batch.input_file_id)
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = ended(client, batch)
    assert batch.status == "cancelled" and batch.cancelling_at and batch.cancelled_at
    good, rest = lines_of(client, batch.output_file_id), lines_of(client, batch.error_file_id)
    assert {line["custom_id"] for line in good + rest} == {line["custom_id"] for line in lines}
    assert len(good) + len(rest) == 3000 and len(good) < 3000
    assert {line["error"]["code"] for line in rest} == {"batch_cancelled"}
    assert client.batches.cancel(batch.id).status == "cancelled", "once more changes nothing"
    for file_id in (batch.input_file_id, batch.output_file_id, batch.error_file_id):
        if file_id is not None:
            client.files.delete(file_id)


def test_a_window_that_ends_before_the_batch(client: OpenAI) -> None:
    lines = [request(f"request-{i}", count_to(9, max_tokens=400, ignore_eos=True)) for i in range(3000)]
    batch = ended(client, created(client, jsonl(lines), "2s"))
    assert batch.status == "expired" and batch.expired_at and batch.expired_at >= batch.created_at + 2
    good, rest = lines_of(client, batch.output_file_id), lines_of(client, batch.error_file_id)
    assert len(good) + len(rest) == 3000
    assert {line["error"]["code"] for line in rest} == {"batch_expired"}
    with pytest.raises(openai.BadRequestError, match="expired cannot be cancelled"):
        client.batches.cancel(batch.id)
    for file_id in (batch.input_file_id, batch.output_file_id, batch.error_file_id):
        if file_id is not None:
            client.files.delete(file_id)


def test_what_cannot_be_uploaded(batch_server: Server, folder: Path) -> None:
    before = files_in(folder)
    check_error(upload(batch_server, fields={"purpose": "fine-tune"}), 400, "purpose")
    check_error(upload(batch_server, b""), 400, "file")
    check_error(upload(batch_server, b"x" * (2**20 + 1)), 413, "file", "file_too_large")
    check_error(upload(batch_server, fields={"expires_after[seconds]": "5"}), 400, "expires_after[seconds]")
    check_error(upload(batch_server, fields={"expires_after[anchor]": "now"}), 400, "expires_after[anchor]")
    check_error(upload(batch_server, fields={"frob": "1"}), 400, "frob", "unknown_parameter")
    http = batch_server.http
    check_error(http.post("/v1/files", data={"purpose": "batch"}), 400, None, "invalid_form")
    check_error(http.post("/v1/files", json={}), 400, None, "invalid_form")
    check_error(http.post("/v1/files", files={"file": ("a", b"{}")}), 400, "purpose")
    check_error(http.post("/v1/files", files={"purpose": (None, b"batch")}), 400, "file")
    two = [("file", ("a", b"{}")), ("file", ("b", b"{}"))]
    check_error(http.post("/v1/files", files=two, data={"purpose": "batch"}), 400, "file")
    kind = {"content-type": "multipart/form-data; boundary=b"}
    check_error(http.post("/v1/files", content=b"--b\r\nno end", headers=kind), 400, None, "invalid_form")
    check_error(http.post("/v1/files", content=iter([b"--b"]), headers=kind), 400, None, "invalid_form")
    check_error(http.post("/v1/files", content=b"--b--", headers={**kind, "content-encoding": "gzip"}), 415)
    assert files_in(folder) == before, "nothing is left of them"


def test_a_folder_that_is_full(batch_server: Server, client: OpenAI, folder: Path) -> None:
    kept = []
    while (answer := upload(batch_server, b"x" * 900_000)).status_code == 200:
        kept.append(answer.json()["id"])
    check_error(answer, 413, "file", "storage_full")
    assert 1 <= len(kept) <= 3
    for file_id in kept:
        client.files.delete(file_id)
    assert upload(batch_server, b"x" * 900_000).status_code == 200


def test_files_that_are_kept_for_a_while(batch_server: Server, client: OpenAI) -> None:
    file = client.files.create(
        file=("a.jsonl", jsonl(counting(1))), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert file.expires_at == file.created_at + 3600 and file.filename == "a.jsonl" and file.status == "processed"
    batch = client.batches.create(
        input_file_id=file.id,
        endpoint=CHAT,
        completion_window="24h",
        output_expires_after={"anchor": "created_at", "seconds": 7200},
    )
    output = client.files.retrieve(str(ended(client, batch).output_file_id))
    assert output.expires_at == output.created_at + 7200
    assert upload(batch_server, b"{}").json()["expires_at"] > output.expires_at + 20 * 86400


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "24"}, "completion_window"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
        ({"input_file_id": 5}, "input_file_id"),
        ({"input_file_id": None}, "input_file_id"),
    ],
)
def test_what_cannot_be_created(fields: dict[str, Any], param: str, batch_server: Server) -> None:
    file_id = upload(batch_server).json()["id"]
    body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h", **fields}
    check_error(batch_server.post("/v1/batches", body), 400, param)


def test_without_a_folder_the_setting_is_named(server: Server) -> None:
    for path in ("/v1/files", "/v1/batches", "/v1/batches/batch_1/cancel"):
        error = check_error(server.post(path, {}), 404, None, "unsupported_endpoint")
        assert "--batch-dir" in error["message"]


def test_two_servers_do_not_share_a_folder(batch_server: Server, folder: Path) -> None:
    with Server("--batch-dir", str(folder), wait=False) as second:
        assert second.wait(60) == 1
        assert f"the batch folder {folder} is in use by another process" in second.log()


def test_nobody_else_may_read_it(batch_server: Server, folder: Path) -> None:
    assert os.stat(folder).st_mode & 0o077 == 0


def test_who_waits_for_an_answer_goes_first(tmp_path: Path, slow_engine: None) -> None:
    """There is one seat, and the batch has it: whoever comes gets it at once."""
    with Server("--batch-dir", str(tmp_path / "b"), "--max-num-seqs", "1") as server:
        client = client_of(server)
        lines = [request(f"request-{i}", count_to(9, max_tokens=400, ignore_eos=True)) for i in range(8)]
        batch = created(client, jsonl(lines))
        wait_for(lambda: server.metric("vllm:generation_tokens_total", "vllm:num_requests_running") >= 1, 30)
        preemptions = 0.0
        for _ in range(5):
            assert server.chat("Hello", max_tokens=4).status_code == 200
            preemptions = server.metric("vllm:num_preemptions_total")
        assert preemptions >= 1, "a line of the batch gave way"
        assert client.batches.retrieve(batch.id).status == "in_progress", "and the batch goes on behind them"
        client.batches.cancel(batch.id)
        assert ended(client, batch).status == "cancelled"


def until(client: OpenAI, batch: Batch, num: int) -> int:
    """How many requests are answered, when `num` are."""

    def answered() -> int:
        counts = client.batches.retrieve(batch.id).request_counts
        assert counts is not None
        return counts.completed if counts.completed >= num else 0

    return int(wait_for(answered, 100))


def kill_in_the_middle(folder: Path, num: int, num_kills: int) -> None:
    """0 lost, 0 doubled: whatever was answered when the server was killed is kept, what was not is asked again."""
    asked = counting(num)
    batch, seen = None, 0
    for kill in range(num_kills + 1):
        with Server("--batch-dir", str(folder)) as server:
            client = client_of(server)
            if batch is None:
                batch = created(client, jsonl(asked), metadata={"kills": str(num_kills)})
            if kill == num_kills:
                batch = ended(client, batch)
                output = lines_of(client, batch.output_file_id)
                break
            before, seen = seen, until(client, batch, seen + (num - seen) // (num_kills + 1 - kill) // 2 + 1)
            assert before < seen < num, "it is killed in the middle"
            server.process.kill()
            server.process.wait()
    assert batch is not None and batch.status == "completed" and batch.error_file_id is None
    assert batch.request_counts is not None and batch.request_counts.completed == num
    check_counted(asked, output)


def test_a_server_that_is_killed_loses_no_line_and_doubles_none(tmp_path: Path) -> None:
    kill_in_the_middle(tmp_path / "b", 100, 1)


def test_a_server_that_is_told_to_stop_does_not_wait_for_batches(tmp_path: Path, slow_engine: None) -> None:
    lines = [request(f"request-{i}", count_to(9, max_tokens=400, ignore_eos=True)) for i in range(500)]
    with Server("--batch-dir", str(tmp_path / "b"), "--drain-timeout-s", "100") as server:
        client = client_of(server)
        batch = created(client, jsonl(lines))
        wait_for(lambda: client.batches.retrieve(batch.id).status == "in_progress", 30)
        server.signal()
        assert server.wait(60) == 0
        assert "Traceback" not in server.log()
    with Server("--batch-dir", str(tmp_path / "b")) as server:
        client = client_of(server)
        assert client.batches.retrieve(batch.id).status == "in_progress"
        client.batches.cancel(batch.id)
        assert ended(client, batch).status == "cancelled"
