"""Where an expert's width is cut into slices: pure arithmetic, which knows neither weights nor hosts."""

# Columns that stay together, the widest that leaves every slice some: quantisation groups of published checkpoints and
# strips of the native passes divide 128; 16 keeps rows of narrow models on aligned addresses.
GRAINS = (128, 16, 1)


def slice_bounds(expert_width: int, num_slices: int) -> tuple[range, ...]:
    """Return the columns of each slice: in order, together all of them, as many as any other's but for one grain.

    ValueError where a slice would be empty.
    """
    if not 1 <= num_slices <= expert_width:
        raise ValueError(
            f"expert_slices={num_slices} does not fit experts {expert_width} wide: give 1 (whole) to {expert_width}"
        )
    grain = next(one for one in GRAINS if -(-expert_width // one) >= num_slices)
    num_grains = -(-expert_width // grain)
    share, larger = divmod(num_grains, num_slices)
    stops = [grain * ((index + 1) * share + min(index + 1, larger)) for index in range(num_slices)]
    starts = [0, *stops[:-1]]
    return tuple(range(start, min(stop, expert_width)) for start, stop in zip(starts, stops, strict=True))
