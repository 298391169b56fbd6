"""Tiles other than those that are shipped, for runs that compare them: `--tile wide=64,32,8,3`."""

from dataclasses import replace

import torch
import typer

from kernels.ops import expert_bank_kernel, mla_decode_kernel

PLACES = ("wide", "fp8_down")


def put(asked: str) -> None:
    """Have this process launch a kernel with other numbers; raises typer.BadParameter for what is none.

    `wide` is that of `mla_decode` with many heads: rows, tokens, warps, stages. `fp8_down` is that of the
    second product of FP8 experts with many tokens: tokens, columns, warps, stages.
    """
    place, _, told = asked.partition("=")
    numbers = [int(number) for number in told.split(",") if number.isdecimal()]
    if place not in PLACES or len(numbers) != 4 or told.count(",") != 3:
        raise typer.BadParameter(f"--tile {asked}: give {' or '.join(PLACES)}, =, and four numbers")
    if place == "wide":
        mla_decode_kernel.WIDE = mla_decode_kernel.Tiling(*numbers)
        return
    *fewer, many = expert_bank_kernel.TILES[torch.float8_e4m3fn]
    tiles = (*fewer, replace(many, down=expert_bank_kernel.Tile(*numbers)))
    expert_bank_kernel.TILES[torch.float8_e4m3fn] = tiles
