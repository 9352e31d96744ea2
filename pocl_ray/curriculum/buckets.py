"""Buckets: disjoint slices of the ranking, 0 the easiest (POCL, section 3.3)."""

from __future__ import annotations

from pocl_ray.errors import ConfigError


def bucket_ends(num_rows: int, num_buckets: int) -> tuple[int, ...]:
    """Return where each bucket ends in the ranking, as cumulative row counts.

    All buckets hold `floor(num_rows / num_buckets)` rows but the last, which takes the remainder as well.

    Raises:
        ConfigError: There are more buckets than rows.
    """
    if num_buckets > num_rows:
        raise ConfigError(
            f"curriculum.num_buckets: {num_buckets} buckets cannot be made of {num_rows} rows; "
            f"set it to {num_rows} or less"
        )
    size = num_rows // num_buckets
    return (*(size * (k + 1) for k in range(num_buckets - 1)), num_rows)
