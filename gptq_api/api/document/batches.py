"""Shapes of files and batches."""

from __future__ import annotations

from typing import Any, get_args

from gptq_api.api.document.primitives import COUNT, NULL, TEXT, TIME, Schema, array, const, either, ref, shape
from gptq_api.batch.records import Status

_TEXT_OR_NULL = either(TEXT, NULL)
_TIME_OR_NULL = either(TIME, NULL)
_STATUS = const(*get_args(Status))
_SECONDS: Schema = {"type": "integer", "minimum": 3600, "maximum": 2592000}

FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "minLength": 1,
                            "maxLength": 2**31,
                            "description": "JSONL: a request in each line, as OpenAI's batches have them.",
                        },
                        "purpose": const("batch"),
                        "expires_after[anchor]": const("created_at"),
                        "expires_after[seconds]": _SECONDS | {"description": "Default: 30 days."},
                    },
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                }
            }
        },
    }
}
"""what the framework cannot find out about POST /v1/files"""


def _listed(name: str) -> Schema:
    return shape(
        object=const("list"),
        data=array(ref(name)),
        first_id=_TEXT_OR_NULL,
        last_id=_TEXT_OR_NULL,
        has_more={"type": "boolean"},
    )


BATCH_SHAPES: dict[str, Schema] = {
    "File": shape(
        id=TEXT,
        object=const("file"),
        bytes=COUNT,
        created_at=TIME,
        expires_at=TIME,
        filename=TEXT,
        purpose=const("batch", "batch_output"),
        status=const("processed"),
        status_details=NULL,
    ),
    "Files": _listed("File"),
    "FileDeleted": shape(id=TEXT, object=const("file"), deleted={"const": True}),
    "Content": TEXT,
    "Batch": shape(
        id=TEXT,
        object=const("batch"),
        endpoint=TEXT,
        errors=either(
            shape(
                object=const("list"),
                data=array(shape(code=TEXT, message=TEXT, param=_TEXT_OR_NULL, line=either(COUNT, NULL)), maxItems=100),
            ),
            NULL,
        ),
        input_file_id=TEXT,
        completion_window=TEXT,
        status=_STATUS,
        output_file_id=_TEXT_OR_NULL,
        error_file_id=_TEXT_OR_NULL,
        created_at=TIME,
        in_progress_at=_TIME_OR_NULL,
        expires_at=TIME,
        finalizing_at=_TIME_OR_NULL,
        completed_at=_TIME_OR_NULL,
        failed_at=_TIME_OR_NULL,
        expired_at=_TIME_OR_NULL,
        cancelling_at=_TIME_OR_NULL,
        cancelled_at=_TIME_OR_NULL,
        request_counts=shape(total=COUNT, completed=COUNT, failed=COUNT),
        metadata=either({"type": "object", "additionalProperties": TEXT}, NULL),
    ),
    "Batches": _listed("Batch"),
}
