"""/v1/batches: many requests that nobody waits for."""

from __future__ import annotations

import time
from typing import Annotated, Any

import msgspec
from fastapi import Path, Query, Response

from gptq_api.api.answers.encoding import json_response
from gptq_api.api.batches import Batches, BatchesDep
from gptq_api.api.document.declare import BODY, answers
from gptq_api.api.errors import ApiError, bad_request, shutting_down
from gptq_api.api.requests.batches import LONGEST_KEPT_S, BatchRequest, window_s
from gptq_api.api.requests.fields import unknown_header
from gptq_api.api.requests.upload import PURPOSE
from gptq_api.api.routes.files import found_file, listed
from gptq_api.api.routes.guard import guarded_router
from gptq_api.api.service import RecordDep, ServiceDep
from gptq_api.batch.records import BatchRecord, ListPage
from gptq_api.batch.store import new_batch_id

router = guarded_router()

BatchId = Annotated[str, Path(max_length=64)]
MAX_UNFINISHED = 100
"""batches of one key that have not ended"""


def spelled(batch: BatchRecord) -> dict[str, Any]:
    errors = None if batch.errors is None else {"object": "list", "data": msgspec.json.decode(batch.errors)}
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": errors,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": batch.created_at,
        "in_progress_at": batch.in_progress_at,
        "expires_at": batch.expires_at,
        "finalizing_at": batch.finalizing_at,
        "completed_at": batch.completed_at,
        "failed_at": batch.failed_at,
        "expired_at": batch.expired_at,
        "cancelling_at": batch.cancelling_at,
        "cancelled_at": batch.cancelled_at,
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "metadata": msgspec.json.decode(batch.metadata),
    }


async def _found(batches: Batches, batch_id: str, owner: str) -> BatchRecord:
    """Raises ApiError 404."""
    batch = await batches.do(lambda store: store.batch(batch_id, owner))
    if batch is None:
        raise ApiError(404, f"No batch found with id '{batch_id[:100]}'.", param="id", code="not_found")
    return batch


@router.post("/v1/batches", **answers("Batch", errors=(*BODY, 404, 429, 503)))
async def create_batch(body: BatchRequest, service: ServiceDep, record: RecordDep, batches: BatchesDep) -> Response:
    """Answer the requests of a file, behind those that somebody waits for. What is wrong with its lines the batch
    tells."""
    headers = unknown_header(body.unknown(strict=service.settings.strict_params))
    if service.draining:
        raise shutting_down()
    owner = record.caller.identity
    file = await found_file(batches, body.input_file_id, owner, "input_file_id")
    if file.purpose != PURPOSE:
        raise bad_request(f"The purpose of {file.id} is '{file.purpose}' and not 'batch'.", "input_file_id")
    if len(await batches.do(lambda store: store.unfinished(owner))) >= MAX_UNFINISHED:
        raise ApiError(400, f"{MAX_UNFINISHED} batches of yours have not ended yet.", code="too_many_batches")
    now = int(time.time())
    batch = BatchRecord(
        id=new_batch_id(),
        owner=owner,
        endpoint=body.endpoint,
        input_file_id=file.id,
        completion_window=body.completion_window,
        metadata=msgspec.json.encode(body.metadata).decode(),
        output_seconds=body.output_expires_after.seconds if body.output_expires_after else LONGEST_KEPT_S,
        created_at=now,
        expires_at=now + window_s(body.completion_window),
    )
    await batches.do(lambda store: store.add_batch(batch))
    batches.begin(batch)
    return json_response(spelled(batch), headers)


@router.get("/v1/batches", **answers("Batches", errors=(400,)))
async def list_batches(
    record: RecordDep,
    batches: BatchesDep,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Response:
    """Those of the key, the newest first."""
    found = await batches.do(lambda store: store.batches(record.caller.identity, ListPage(limit, after)))
    if found is None:
        raise bad_request("Invalid value for 'after': there is no such batch.", "after")
    return json_response(listed([spelled(batch) for batch in found[0]], found[1]))


@router.get("/v1/batches/{batch_id}", **answers("Batch", errors=(400, 404)))
async def retrieve_batch(batch_id: BatchId, record: RecordDep, batches: BatchesDep) -> Response:
    """How far it is."""
    return json_response(spelled(await _found(batches, batch_id, record.caller.identity)))


@router.post("/v1/batches/{batch_id}/cancel", **answers("Batch", errors=(400, 404)))
async def cancel_batch(batch_id: BatchId, record: RecordDep, batches: BatchesDep) -> Response:
    """Requests that run are ended; what was answered is in its files when it is `cancelled`."""
    owner = record.caller.identity
    batch = await _found(batches, batch_id, owner)
    if await batches.do(lambda store: store.cancel(batch.id)):
        batches.cancel(batch.id)
    elif batch.status not in ("cancelling", "cancelled"):
        raise ApiError(400, f"A batch that is {batch.status} cannot be cancelled.", param="id", code="not_running")
    return json_response(spelled(await _found(batches, batch.id, owner)))
