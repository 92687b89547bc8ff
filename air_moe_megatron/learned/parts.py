"""Parts of the lists, one for each range of consecutive experts, made independently.

Legend: E experts, C clusters, L shortlist, Q pool, S parts.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """The position of a part."""

    experts: slice  # expert ids
    lists: slice  # columns of the lists [C, L]
    pool: slice  # columns of the pools [C, Q]

    @property
    def pool_size(self) -> int:
        """Q / S, the number of columns of the pools."""
        return self.pool.stop - self.pool.start


def spans(num_parts: int, num_experts: int, shortlist_size: int, pool_size: int) -> list[Span]:
    """The position of each of S parts; S divides the three sizes.

    Example: with 2 parts of E = 8, L = 4 and Q = 6, the second part has the experts 4 to 7, the columns 2 and 3 of the
    lists, and the columns 3 to 5 of the pools.
    """
    lengths = [size // num_parts for size in (num_experts, shortlist_size, pool_size)]
    return [Span(*(slice(number * length, (number + 1) * length) for length in lengths)) for number in range(num_parts)]
