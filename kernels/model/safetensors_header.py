"""The header of a safetensors file, believed only after it has been checked against the file's own size.

A file is eight bytes of header length (little-endian), that much JSON (name to dtype, shape, data_offsets),
then data. All is compared with the size on disk before anyone maps the file: touching a mapped page that lies
beyond the end of a file kills the process.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

HEADER_BYTES_MAX = 100_000_000
DIMENSIONS_COUNT_MAX = 8
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete, or does not fit its own config.json."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: bytes `start` to `end` (exclusive) of the data in `path`."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def bytes_count(self) -> int:
        """Size on disk, in bytes."""
        return self.end - self.start


def read_header(path: Path) -> dict[str, StoredTensor]:
    """All tensors of one file, their ranges proven to lie side by side inside it; raises CheckpointError."""
    header, data_bytes = _read_parts(path)
    document = parse_json(header, f"{path.name}: header")
    document.pop("__metadata__", None)
    tensors = {name: _read_tensor(path, name, entry) for name, entry in document.items()}
    _check_ranges(path, tensors, data_bytes)
    return tensors


def parse_json(text: bytes, what: str) -> dict:
    """A JSON object in which no name comes twice; raises CheckpointError that begins with `what`."""
    try:
        document = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not readable JSON ({error}); download the file again") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{what} is not a JSON object; download the file again")
    return document


def _unique(pairs: list[tuple[str, object]]) -> dict:
    document = {}
    for name, value in pairs:
        if name in document:
            raise ValueError(f"{name!r:.200} comes twice")
        document[name] = value
    return document


def _read_parts(path: Path) -> tuple[bytes, int]:
    """The header's text, and the count of data bytes that follow it."""
    if not path.is_file():
        raise CheckpointError(f"{path.name}: no such file in the checkpoint; download it")
    try:
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > min(file_bytes - 8, HEADER_BYTES_MAX):
                raise CheckpointError(
                    f"{path.name}: a header of {header_bytes} bytes does not fit in a file of {file_bytes} "
                    f"(limit {HEADER_BYTES_MAX}); it is truncated or no safetensors file: download it again"
                )
            return file.read(header_bytes), file_bytes - 8 - header_bytes
    except OSError as error:
        raise CheckpointError(
            f"{path.name}: cannot be read ({error.strerror}); check its permissions"
        ) from error


def _read_tensor(path: Path, name: str, entry: object) -> StoredTensor:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{path.name}: {name}: is not described by an object; download the file again")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{path.name}: {name}: dtype {dtype!r:.40} is unknown; supported: {', '.join(DTYPE_BYTES)}"
        )
    if not _whole_numbers(shape) or len(shape) > DIMENSIONS_COUNT_MAX:
        raise CheckpointError(
            f"{path.name}: {name}: shape {shape!r:.80} is not a list of sizes; download again"
        )
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{path.name}: {name}: data_offsets are not [start, end]; download the file again"
        )
    expected_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != expected_bytes:
        raise CheckpointError(
            f"{path.name}: {name}: {dtype} {shape} takes {expected_bytes} bytes, but its range holds "
            f"{offsets[1] - offsets[0]}; download the file again"
        )
    return StoredTensor(path, dtype, tuple(shape), offsets[0], offsets[1])


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_ranges(path: Path, tensors: dict[str, StoredTensor], data_bytes: int) -> None:
    reached = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != reached:
            problem = "overlaps the tensor before it" if tensor.start < reached else "leaves a gap before it"
            raise CheckpointError(f"{path.name}: {name}: its data {problem}; download the file again")
        reached = tensor.end
    if reached != data_bytes:
        problem = "is truncated" if reached > data_bytes else "has bytes that belong to no tensor"
        raise CheckpointError(
            f"{path.name}: {problem}: its header describes {reached} bytes of data, it holds {data_bytes}; "
            "download it again"
        )
