"""A Hugging Face checkpoint on disk: headers checked as a whole, weights read as they are asked for."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from kernels.model.config import ModelConfig
from kernels.model.safetensors_header import CheckpointError, StoredTensor, parse_json, read_header
from kernels.model.tensor_names import (
    GATE_BIAS_SUFFIX,
    SCALE_SUFFIX,
    expected_shapes,
)
from kernels.ops.fp8_sizes import WEIGHT_BLOCK, scale_shape
from kernels.ops.linear_fp8 import Fp8Weight
from kernels.ops.projection import Weight
from kernels.ops.quantize import dequantize_blocks

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
INDEX_BYTES_MAX = 256 * 1024 * 1024
PLAIN_DTYPES = ("F32", "F16", "BF16")
ProgressCallback = Callable[[int, int], None]
"""Called with how much is done, and how much there is."""

LAYER_PATTERN = re.compile(r"model\.layers\.(\d+)\.")


class Checkpoint:
    """One checkpoint folder whose headers fit its config.json; weights are memory-mapped while they are read.

    Raises ModelConfigError for the config and CheckpointError for everything else. `notices` says in whole
    sentences what was passed over.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.config = ModelConfig.from_folder(self.folder)
        self.notices: list[str] = []
        self._shapes = expected_shapes(self.config)
        self._stored = _read_headers(self.folder)
        self._check_expected()
        self._pass_over_the_rest()

    def load(
        self,
        names: Sequence[str],
        dtype: torch.dtype,
        on_progress: ProgressCallback | None = None,
        keeps_fp8: bool = False,
    ) -> dict[str, Weight]:
        """Copies of the named weights in `dtype`; the gate's bias stays float32.

        Those in FP8 are dequantised, but stay as they are if `keeps_fp8` and their blocks are 128 x 128.
        `on_progress(bytes_done, bytes_total)` counts bytes on disk, scales included, after each tensor.
        """
        if unknown := [name for name in names if name not in self._shapes]:
            raise CheckpointError(f"{unknown[0]}: is no weight of this model; ask for attention_half_names")
        bytes_total = sum(self._bytes_count(name) for name in set(names))
        bytes_done = 0
        loaded = dict.fromkeys(names)
        keeps_fp8 = keeps_fp8 and self.config.weight_format.block == WEIGHT_BLOCK
        for name, tensor in self._read(self._in_disk_order(loaded), dtype, keeps_fp8):
            loaded[name] = tensor
            bytes_done += self._bytes_count(name)
            if on_progress is not None:
                on_progress(bytes_done, bytes_total)
        return loaded

    def _in_disk_order(self, names: dict) -> list[str]:
        return sorted(names, key=lambda name: (self._stored[name].path, self._stored[name].start))

    def _bytes_count(self, name: str) -> int:
        scale = self._stored.get(name + SCALE_SUFFIX)
        return self._stored[name].bytes_count + (scale.bytes_count if scale else 0)

    def _read(
        self, names: Sequence[str], dtype: torch.dtype, keeps_fp8: bool
    ) -> Iterator[tuple[str, Weight]]:
        with ExitStack() as stack:
            files = _OpenFiles(stack)
            for name in names:
                kept = torch.float32 if name.endswith(GATE_BIAS_SUFFIX) else dtype
                tensor = files.read(name, self._stored[name])
                if tensor.dtype != torch.float8_e4m3fn:
                    yield name, tensor.to(kept, copy=True)
                    continue
                scale = files.read(name + SCALE_SUFFIX, self._stored[name + SCALE_SUFFIX])
                if keeps_fp8:
                    yield name, Fp8Weight(tensor.clone(), scale.to(torch.float32, copy=True))
                    continue
                yield name, dequantize_blocks(tensor, scale, self.config.weight_format.block, kept)

    def _check_expected(self) -> None:
        missing = [name for name in self._shapes if name not in self._stored]
        if missing:
            raise CheckpointError(
                f"{missing[0]}: is missing, as are {len(missing) - 1} more of {len(self._shapes)} tensors of "
                "config.json; complete the download, or check that config.json belongs to these weights"
            )
        for name, shape in self._shapes.items():
            stored = self._stored[name]
            if stored.shape != shape:
                raise _wrong_shape(name, stored, shape)
            self._check_dtype(name, stored)

    def _check_dtype(self, name: str, stored: StoredTensor) -> None:
        block = self.config.weight_format.block
        quantised = stored.dtype == "F8_E4M3" and block is not None and len(stored.shape) == 2
        if not quantised and stored.dtype not in PLAIN_DTYPES:
            supported = f"{', '.join(PLAIN_DTYPES)}, and F8_E4M3 where config.json has a quantization_config"
            raise CheckpointError(f"{stored.path.name}: {name}: dtype {stored.dtype}; supported: {supported}")
        scale_name = name + SCALE_SUFFIX
        scale = self._stored.get(scale_name)
        if quantised != (scale is not None):
            problem = (
                "is missing for an FP8 weight" if quantised else f"is there for a weight in {stored.dtype}"
            )
            raise CheckpointError(f"{scale_name}: {problem}; scales and FP8 weights come in pairs")
        if scale is None:
            return
        if scale.shape != scale_shape(*stored.shape, block):
            raise _wrong_shape(scale_name, scale, scale_shape(*stored.shape, block))
        if scale.dtype not in PLAIN_DTYPES:
            raise CheckpointError(
                f"{scale.path.name}: {scale_name}: dtype {scale.dtype}; supported: {', '.join(PLAIN_DTYPES)}"
            )

    def _pass_over_the_rest(self) -> None:
        """Name what has no use here; refuse what a model of this config would not have."""
        known = self._shapes.keys() | {name + SCALE_SUFFIX for name in self._shapes}
        rest = [
            name for name in self._stored if name not in known and not name.endswith(".rotary_emb.inv_freq")
        ]
        next_token = [name for name in rest if self._layer(name) >= self.config.layers_count]
        if next_token:
            layers = sorted({self._layer(name) for name in next_token})
            self.notices.append(f"Layers {layers} predict tokens further ahead and are passed over.")
        if self.config.tied_head and "lm_head.weight" in rest:
            next_token.append("lm_head.weight")
            self.notices.append("lm_head.weight is passed over: config.json ties the head to the embedding.")
        if unknown := sorted(set(rest) - set(next_token)):
            raise CheckpointError(
                f"{unknown[0]}: config.json has no use for it, nor for {len(unknown) - 1} more tensors; "
                "check that config.json belongs to these weights"
            )

    @staticmethod
    def _layer(name: str) -> int:
        match = LAYER_PATTERN.match(name)
        return int(match[1]) if match else -1


class _OpenFiles:
    """Maps each safetensors file once, until the stack it was given is closed."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._readers: dict[Path, safe_open] = {}

    def read(self, name: str, stored: StoredTensor) -> torch.Tensor:
        try:
            if stored.path not in self._readers:
                self._readers[stored.path] = self._stack.enter_context(safe_open(stored.path, framework="pt"))
            tensor = self._readers[stored.path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{stored.path.name}: {name}: {error}; download the file again") from error
        if tuple(tensor.shape) != stored.shape:
            raise CheckpointError(
                f"{stored.path.name}: {name}: changed on disk since it was checked; start again"
            )
        return tensor


def _wrong_shape(name: str, stored: StoredTensor, shape: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{stored.path.name}: {name}: shape {list(stored.shape)}, but config.json asks for {list(shape)}; "
        "check that config.json belongs to these weights"
    )


def _read_headers(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the checkpoint by name, whichever file holds them."""
    if not (folder / INDEX_NAME).exists():
        return read_header(folder / SINGLE_NAME)
    weight_map = _read_index(folder / INDEX_NAME)
    stored: dict[str, StoredTensor] = {}
    for file_name in sorted(set(weight_map.values())):
        tensors = read_header(folder / file_name)
        if twice := stored.keys() & tensors.keys():
            name = min(twice)
            other = stored[name].path.name
            raise CheckpointError(f"{name}: is in both {other} and {file_name}; keep one of them")
        stored |= tensors
    for name, file_name in weight_map.items():
        if name not in stored or stored[name].path.name != file_name:
            raise CheckpointError(
                f"{INDEX_NAME}: {name}: is not in {file_name}; download index and file again"
            )
    return stored


def _read_index(path: Path) -> dict[str, str]:
    try:
        with path.open("rb") as file:
            text = file.read(INDEX_BYTES_MAX + 1)
    except OSError as error:
        raise CheckpointError(
            f"{path.name}: cannot be read ({error.strerror}); check its permissions"
        ) from error
    if len(text) > INDEX_BYTES_MAX:
        raise CheckpointError(f"{path.name}: is larger than {INDEX_BYTES_MAX} bytes; download it again")
    weight_map = parse_json(text, path.name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path.name}: weight_map is missing or empty; download the index again")
    for name, file_name in weight_map.items():
        _check_file_name(name, file_name)
    return weight_map


def _check_file_name(name: str, file_name: object) -> None:
    """Judge the name alone: caches keep links in the folder to files elsewhere, and those are fine."""
    plain = isinstance(file_name, str) and not re.search(r"[/\\\x00]", file_name)
    if not plain or not file_name.endswith(".safetensors"):
        problem = f"file name {file_name!r:.80} is not that of a .safetensors file in this folder"
        raise CheckpointError(f"{INDEX_NAME}: {name}: {problem}; use the index that came with the weights")
