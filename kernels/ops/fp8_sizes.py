"""How large things are in FP8: numbers alone, for whoever places them without computing."""

WEIGHT_BLOCK = (128, 128)
TILE_NUMBERS = 128  # of a latent share a scale


def scale_shape(rows: int, columns: int, block: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of a weight `[rows, columns]`, counting ragged edge blocks."""
    return -(-rows // block[0]), -(-columns // block[1])


def tiles_count(value_dim: int) -> int:
    """Scales of one token's latent."""
    return -(-value_dim // TILE_NUMBERS)


def packed_bytes(value_dim: int, position_dim: int) -> int:
    """Bytes of one token's latent; `value_dim` is a multiple of four."""
    return value_dim + 4 * tiles_count(value_dim) + 2 * position_dim
