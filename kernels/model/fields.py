"""Typed reads from a JSON object of a checkpoint, each naming the field that it refuses."""

import json
from collections.abc import Sequence
from pathlib import Path

SIZE_MAX = 2**31 - 1
DOCUMENT_BYTES_MAX = 16 * 1024 * 1024


class ModelConfigError(ValueError):
    """A config.json that is ill-formed, or that describes a model this project would not run correctly."""

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"model config field '{field}': {problem}; {remedy}")
        self.field = field


class Fields:
    """The named values of one JSON object; each read raises ModelConfigError when it must refuse."""

    def __init__(self, values: dict, prefix: str = "") -> None:
        if not isinstance(values, dict):
            name = prefix.rstrip(".") or "config.json"
            raise ModelConfigError(name, "is not a JSON object", "give an object")
        self.values = values
        self._prefix = prefix

    def refuse(self, name: str, problem: str, remedy: str) -> ModelConfigError:
        return ModelConfigError(self._prefix + name, problem, remedy)

    def get(self, name: str) -> object:
        return self.values.get(name)

    def nested(self, name: str) -> "Fields":
        return Fields(self.values.get(name), f"{self._prefix}{name}.")

    def size(self, name: str, minimum: int = 1, maximum: int = SIZE_MAX, default: int | None = None) -> int:
        value = self.values.get(name, default)
        if value is None:
            raise self.refuse(name, "is missing", f"give a whole number from {minimum} to {maximum}")
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.refuse(name, f"is {shown(value)}", f"give a whole number from {minimum} to {maximum}")
        return value

    def nullable_size(self, name: str, minimum: int = 1, maximum: int = SIZE_MAX) -> int | None:
        if name not in self.values:
            raise self.refuse(name, "is missing", "give a whole number, or null for a model without it")
        return None if self.values[name] is None else self.size(name, minimum, maximum)

    def number(self, name: str, default: float | None = None, minimum: float = 0.0) -> float:
        value = self.values.get(name, default)
        if value is None:
            raise self.refuse(name, "is missing", f"give a finite number of at least {minimum:g}")
        # Whole numbers are bounded first: a JSON integer can be too large to become a float.
        if isinstance(value, bool) or not isinstance(value, int | float) or not minimum <= value <= 1e30:
            raise self.refuse(name, f"is {shown(value)}", f"give a finite number of at least {minimum:g}")
        return float(value)

    def positive(self, name: str, default: float | None = None) -> float:
        value = self.number(name, default)
        if value == 0:
            raise self.refuse(name, "is 0", "give a number above 0")
        return value

    def optional_number(self, name: str) -> float | None:
        return None if self.values.get(name) is None else self.number(name)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, f"is {shown(value)}", "give true or false")
        return value

    def choice(self, name: str, choices: Sequence[str], default: str | None = None) -> str:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, str) or value not in choices:
            problem = "is missing" if value is None else f"is {shown(value)}"
            raise self.refuse(name, problem, f"supported: {', '.join(choices)}")
        return value

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        value = self.values.get(name)
        listed = [] if value is None else value if isinstance(value, list) else [value]
        for token_id in listed:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
                remedy = f"give token ids from 0 to {vocab_size - 1} (vocab_size - 1)"
                raise self.refuse(name, f"holds {shown(token_id)}", remedy)
        return tuple(dict.fromkeys(listed))


def shown(value: object) -> str:
    """A value as an error message may print it: at most 63 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def read_fields(path: Path) -> Fields:
    """The object in a JSON file of at most DOCUMENT_BYTES_MAX bytes; ModelConfigError names the file."""
    remedy = "give the folder of a Hugging Face checkpoint"
    text = _read_bytes(path, remedy)
    try:
        return Fields(json.loads(text), f"{path.name}.")
    except ModelConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ModelConfigError(path.name, "is not valid JSON", remedy) from error


def _read_bytes(path: Path, remedy: str) -> bytes:
    try:
        with path.open("rb") as file:
            text = file.read(DOCUMENT_BYTES_MAX + 1)
    except OSError as error:
        raise ModelConfigError(path.name, f"cannot be read ({error.strerror})", remedy) from error
    if len(text) > DOCUMENT_BYTES_MAX:
        raise ModelConfigError(path.name, f"is larger than {DOCUMENT_BYTES_MAX} bytes", remedy)
    return text
