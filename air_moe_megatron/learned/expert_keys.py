"""Keys of experts: the score of an expert at its best codeword, and that codeword, in one integer."""

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
