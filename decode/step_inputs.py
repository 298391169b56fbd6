"""What a decode step needs of its requests, as tensors on the node's device."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch.nn.utils.rnn import pad_sequence

from decode.request import DecodeRequest

ROWS_STEP = 8


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One row for each request: its newest token, and where its latents are."""

    token_ids: torch.Tensor
    """`[requests]` int64."""
    positions: torch.Tensor
    """`[requests]` int64."""
    slots: torch.Tensor
    """Where the newest token's latent goes, `[requests]` int64; -1 for nowhere."""
    pages: torch.Tensor
    """`[requests, most]` int32."""
    lengths: torch.Tensor
    """Tokens to attend to, the newest included, `[requests]` int32."""

    @classmethod
    def of(cls, requests: Sequence[DecodeRequest], device: torch.device) -> "StepInputs":
        """Gathered on the CPU and sent without waiting."""
        positions = torch.tensor([request.position for request in requests])
        columns = (
            torch.tensor([request.token_ids[-1] for request in requests]),
            positions,
            torch.tensor([request.next_slot() for request in requests]),
            pad_sequence([request.page_table for request in requests], batch_first=True),
            (positions + 1).to(torch.int32),
        )
        if device.type == "cpu":
            return cls(*columns)
        return cls(*(column.pin_memory().to(device, non_blocking=True) for column in columns))

    @classmethod
    def blank(cls, rows: int, pages_count: int, device: torch.device) -> "StepInputs":
        """Requests that are nobody's: their latents are written nowhere."""
        zeros = torch.zeros(rows, dtype=torch.int64, device=device)
        pages = torch.zeros(rows, pages_count, dtype=torch.int32, device=device)
        return cls(zeros, zeros.clone(), zeros - 1, pages, torch.ones_like(zeros, dtype=torch.int32))

    @property
    def requests_count(self) -> int:
        """Rows."""
        return len(self.token_ids)

    def fill(self, inputs: "StepInputs") -> None:
        """Take other requests' rows; those beyond are the first one's, whose latent is written once."""
        count = inputs.requests_count
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(inputs, field.name)
            room = mine[:, : theirs.shape[1]] if mine.dim() == 2 else mine
            room[:count].copy_(theirs)
            room[count:].copy_(theirs[:1])
        self.slots[count:].fill_(-1)


def bucket_of(rows: int) -> int:
    """Rows of the recorded step that so many requests fit: a power of two up to eight, then eights."""
    return 1 << (rows - 1).bit_length() if rows <= ROWS_STEP else -(-rows // ROWS_STEP) * ROWS_STEP
