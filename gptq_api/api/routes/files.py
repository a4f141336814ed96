"""/v1/files: what batches are made of, and what they answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal

import structlog
from fastapi import Path as PathParameter
from fastapi import Query, Request, Response
from fastapi.responses import StreamingResponse

from gptq_api.api.answers.encoding import json_response
from gptq_api.api.batches import Batches, BatchesDep
from gptq_api.api.document.batches import FORM
from gptq_api.api.document.declare import answers
from gptq_api.api.errors import ApiError, bad_request, shutting_down
from gptq_api.api.requests.upload import PURPOSE, Room, in_thread, read_form
from gptq_api.api.routes.guard import guarded_router
from gptq_api.api.service import RecordDep, ServiceDep
from gptq_api.batch.records import FileRecord, ListPage
from gptq_api.batch.store import new_file_id

log = structlog.get_logger()
router = guarded_router()

FileId = Annotated[str, PathParameter(max_length=64)]
CONTENT_TYPE = "application/jsonl"
READ_BYTES = 256 * 1024
MIB = 2**20


def spelled(file: FileRecord) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def listed(entries: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    ids = [entry["id"] for entry in entries]
    ends = {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
    return {"object": "list", "data": entries, **ends, "has_more": has_more}


async def found_file(batches: Batches, file_id: str, owner: str, param: str | None = None) -> FileRecord:
    """Raises ApiError 404."""
    file = await batches.do(lambda store: store.file(file_id, owner))
    if file is None:
        raise ApiError(404, f"No such File object: {file_id[:100]}.", param=param or "id", code="not_found")
    return file


@router.post("/v1/files", openapi_extra=FORM, **answers("File", errors=(400, 408, 413, 415, 503)))
async def upload(request: Request, service: ServiceDep, record: RecordDep, batches: BatchesDep) -> Response:
    """Keep a file of requests, for a batch."""
    if service.draining:
        raise shutting_down()
    owner, file_id = record.caller.identity, new_file_id()
    length = request.headers.get("content-length", "")
    most = service.settings.batch_file_mib * MIB
    room = Room(most, await batches.num_free())
    with batches.uploading(min(most, int(length[:20])) if length.isdecimal() else most):
        async with in_thread(batches.folder.new(file_id)) as file:
            form = await read_form(request, file, room)
            seconds = form.check()
    assert form.filename is not None
    now = int(time.time())
    kept = FileRecord(file_id, owner, form.filename, PURPOSE, form.size, now, now + seconds)
    await batches.do(lambda store: store.add_file(kept))
    return json_response(spelled(kept))


@router.get("/v1/files", **answers("Files", errors=(400,)))
async def list_files(
    record: RecordDep,
    batches: BatchesDep,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=10000)] = 10000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> Response:
    """Those of the key, the newest first."""
    page = ListPage(limit, after, newest_first=order == "desc")
    found = await batches.do(lambda store: store.files(record.caller.identity, page, purpose))
    if found is None:
        raise bad_request("Invalid value for 'after': there is no such file.", "after")
    return json_response(listed([spelled(file) for file in found[0]], found[1]))


@router.get("/v1/files/{file_id}", **answers("File", errors=(400, 404)))
async def retrieve_file(file_id: FileId, record: RecordDep, batches: BatchesDep) -> Response:
    """What is known about it."""
    return json_response(spelled(await found_file(batches, file_id, record.caller.identity)))


@router.delete("/v1/files/{file_id}", **answers("FileDeleted", errors=(400, 404)))
async def delete_file(file_id: FileId, record: RecordDep, batches: BatchesDep) -> Response:
    """Its content is gone at once. A file that a batch still reads is not deleted."""
    file = await found_file(batches, file_id, record.caller.identity)
    if (user := await batches.do(lambda store: store.used_by(file.id))) is not None:
        raise ApiError(400, f"{file.id} is read by {user}: cancel that first.", param="id", code="file_in_use")
    await batches.do(lambda store: store.delete_file(file.id))
    return json_response({"id": file.id, "object": "file", "deleted": True})


@router.get("/v1/files/{file_id}/content", **answers("Content", media_type=CONTENT_TYPE, errors=(400, 404)))
async def content(file_id: FileId, request: Request, record: RecordDep, batches: BatchesDep) -> Response:
    """Its lines."""
    file = await found_file(batches, file_id, record.caller.identity)
    headers = {"content-length": str(file.bytes)}
    if request.method == "HEAD":
        return Response(headers=headers, media_type=CONTENT_TYPE)
    return StreamingResponse(_pieces(batches.folder.file(file.id)), headers=headers, media_type=CONTENT_TYPE)


async def _pieces(path: Path) -> AsyncIterator[bytes]:
    """A file that is deleted meanwhile can be read to its end."""
    file = await asyncio.to_thread(path.open, "rb")
    try:
        while piece := await asyncio.to_thread(file.read, READ_BYTES):
            yield piece
    finally:
        file.close()
