"""What is told of a configuration that does not fit: the key, its limit, and what to do."""

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError

from cluster.errors import InvalidConfig


def explained(error: ValidationError, source: str, root: type[BaseModel]) -> InvalidConfig:
    """Tell the first problem; an unknown key goes first, since it is likely why another is missing."""
    problems = error.errors(include_url=False)
    problem = next((one for one in problems if one["type"] == "extra_forbidden"), problems[0])
    key = ".".join(str(part) for part in problem["loc"]) or "the file"
    field = f"{source}: {key}"
    if problem["type"] == "extra_forbidden":
        return _unknown_key(field, problem["loc"], root)
    if problem["type"] == "missing":
        return InvalidConfig(
            "MISSING_KEY",
            "this key is missing",
            field,
            limit="it has no default",
            remedy=f"Add {key} to the file.",
        )
    limit = "a section of keys" if problem["type"] == "model_type" else problem["msg"]
    return InvalidConfig(
        "INVALID_VALUE",
        f"{_shortened(problem['input'])} does not fit",
        field,
        limit=limit.removeprefix("Value error, ").replace("Input should be", "it should be"),
        remedy="Change the value, or leave the key out to take its default.",
    )


def _unknown_key(field: str, location: tuple[int | str, ...], root: type[BaseModel]) -> InvalidConfig:
    known = _known_keys(location[:-1], root)
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return InvalidConfig(
        "UNKNOWN_KEY",
        "there is no such key",
        field,
        limit=f"one of {', '.join(known)}",
        remedy=f"Did you mean {close[0]}?" if close else "Take it out.",
    )


def _known_keys(location: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    section = root
    for part in location:
        section = section.model_fields[str(part)].annotation
    return list(section.model_fields)


def _shortened(value: Any) -> str:
    """Show a value in an error; what is nested only by its type, since it may be huge."""
    return repr(value)[:80] if isinstance(value, str | int | float | bool | None) else type(value).__name__
