"""A model's folder, opened with errors that say what to do."""

from pathlib import Path

from cluster.errors import InvalidModel
from kernels.model.checkpoint import Checkpoint
from kernels.model.config import ModelConfigError
from kernels.model.safetensors_header import CheckpointError


def open_checkpoint(folder: Path) -> Checkpoint:
    """The model's headers, checked; raises InvalidModel."""
    try:
        return Checkpoint(folder)
    except (ModelConfigError, CheckpointError, OSError) as error:
        raise InvalidModel(
            reason="MODEL_UNUSABLE",
            message=f"{folder} cannot be served: {error}",
            field="model.folder",
            remedy="Name the folder of a complete checkpoint, in the file or with --model.",
        ) from error
