"""Requests and errors as text: what a command line hands on."""

from typing import Any

from pydantic import TypeAdapter

from cluster.errors import InvalidRequest, TriviumError
from cluster.validation import RequestedGeneration

REQUEST = TypeAdapter(RequestedGeneration)


def as_json(request: RequestedGeneration) -> str:
    """A request as JSON, NaN and all, for the validator to judge."""
    return REQUEST.dump_json(request, serialize_as_any=False).decode()


def from_json(text: str) -> RequestedGeneration:
    """The request in a JSON text that `as_json` made; raises ValueError."""
    return REQUEST.validate_json(text)


def error_values(error: TriviumError) -> dict[str, Any]:
    """An error as values for JSON; what does not apply is null."""
    keys = ("reason", "message", "field", "limit", "remedy", "retry_after_s")
    return {"error": {"kind": type(error).__name__} | {key: getattr(error, key) for key in keys}}


def read_token_ids(text: str) -> tuple[int, ...]:
    """Ids in a text such as 1,2,3; raises InvalidRequest."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise InvalidRequest(
            reason="BAD_TOKEN_IDS",
            message="these are not numbers with commas between",
            field="--token-ids",
            remedy="Write them as 1,2,3.",
        ) from error
