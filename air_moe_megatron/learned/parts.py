"""Parts of the lists, one for each range of consecutive experts, made independently; and keys of best codewords.

Legend: E experts, C clusters, L shortlist, Q pool, S parts.
"""

from dataclasses import dataclass

import torch

_ID_BITS = 2**31 - 1


def pack_keys(score: torch.Tensor, codeword: torch.Tensor) -> torch.Tensor:
    """Pack scores and codewords into keys, whose maximum is the highest score, and on a tie the lower codeword.

    The upper 32 bits of a key are the score, as an integer in the same order, and the lower ones the inverted codeword.
    So ranks can exchange both by one all-reduce. Does not wait for the device.

    Args:
        score: [...] fp32; NaN counts as infinite.
        codeword: [...] int64, ids from 0 to 2^31 - 1; its shape and that of the scores are broadcast together.
    Returns:
        [...] int64, of the broadcast shape.

    Example: the scores [1.0, 2.0, 2.0] at the codewords [5, 4, 3] give keys in ascending order.
    """
    bits = (score + 0.0).nan_to_num(torch.inf, torch.inf, -torch.inf).view(torch.int32)  # -0.0 equals 0.0
    bits = bits ^ ((bits >> 31) & _ID_BITS)  # as integers, negative floats are in reverse order
    return (bits.long() << 32) | (codeword ^ _ID_BITS)


def unpack_keys(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the scores and codewords that :func:`pack_keys` has packed.

    Args:
        keys: [...] int64.
    Returns:
        [...] fp32 scores, infinite where NaN was packed; [...] int64 codewords.

    Example: the key of the score 2.0 and the codeword 3 gives 2.0 and 3.
    """
    bits = (keys >> 32).int()
    return (bits ^ ((bits >> 31) & _ID_BITS)).view(torch.float32), (keys & _ID_BITS) ^ _ID_BITS


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
