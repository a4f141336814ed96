"""What the database holds, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
STATUSES: tuple[Status, ...] = get_args(Status)
UNFINISHED_STATUSES = ("validating", "in_progress", "finalizing", "cancelling")
End = Literal["completed", "expired", "cancelled"]


@dataclass(slots=True, frozen=True)
class FileRecord:
    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int


@dataclass(slots=True, frozen=True)
class BatchRecord:
    """Times are Unix times in seconds."""

    id: str
    owner: str
    endpoint: str
    """what all lines ask; "": each says it itself"""
    input_file_id: str
    completion_window: str
    metadata: str
    """JSON"""
    output_seconds: int
    """for which its files are kept"""
    created_at: int
    expires_at: int
    status: Status = "validating"
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: str | None = None
    """JSON"""
    total: int = 0
    completed: int = 0
    failed: int = 0
    answer_bytes: int = 0
    """of answers in the database"""


@dataclass(slots=True, frozen=True)
class PendingLine:
    """A request without an answer."""

    number: int
    custom_id: str
    url: str
    offset: int
    size: int
    deaths: int
    """how many engines have died over it, or beside it"""


@dataclass(slots=True, frozen=True)
class ListPage:
    """Of a list: what follows `after`, which is the id of an entry."""

    limit: int = 20
    after: str | None = None
    newest_first: bool = True
