"""Read Megatron's indexed data sets from disk, and find what is wrong with their files and token ids."""

import os
import struct
from dataclasses import dataclass

import numpy
from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType, get_bin_path, get_idx_path

_HEADER = struct.Struct("<QBQQ")
"""Header after the magic bytes: version, code of the token dtype, numbers of sequences and of document boundaries."""

_LENGTH = struct.Struct("<i")
"""Length of a sequence in tokens. The index lists one per sequence after its header."""

_POINTER = struct.Struct("<q")
"""Byte offset of a sequence in the .bin file. The index lists one per sequence after the lengths, and then the document
boundaries, which have the same size."""

SCANNED_BLOCKS, _BLOCK_BYTES = 64, 2**20
"""How many blocks of a file are searched for ids beyond the vocabulary, and their size in bytes."""

_PAD_ID = -1
"""Megatron's padding id if the tokenizer has none. It is replaced before the embedding sees it."""

_PAIR_RULE = "a Megatron indexed data set is a pair x.bin, x.idx, named without its ending"


@dataclass(frozen=True)
class IndexedTokens:
    """Sequence lengths and tokens of an indexed data set, mapped from disk."""

    prefix: str
    lengths: numpy.ndarray  # tokens of each sequence
    tokens: numpy.ndarray  # memory map of all tokens


def read_indexed_dataset(prefix: str, name: str) -> IndexedTokens:
    """Read the index of a data set and map its tokens, after checking that both files are whole.

    Args:
        prefix: path of the pair, without .bin and .idx.
        name: name of the data set in errors.
    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    idx_path, bin_path = get_idx_path(prefix), get_bin_path(prefix)
    idx_size = check_file(idx_path, name, _PAIR_RULE)
    bin_size = check_file(bin_path, name, _PAIR_RULE)

    with open(idx_path, "rb") as file:
        header = file.read(len(_INDEX_HEADER) + _HEADER.size)
        if not header.startswith(_INDEX_HEADER):
            raise ValueError(f"{name}: '{idx_path}' does not begin with {_INDEX_HEADER!r}; {_PAIR_RULE}")
        if len(header) < len(_INDEX_HEADER) + _HEADER.size:
            raise ValueError(f"{name}: '{idx_path}' ends within its header, at byte {idx_size}")
        version, dtype_code, num_sequences, num_boundaries = _HEADER.unpack_from(header, len(_INDEX_HEADER))
        if version != 1:
            raise ValueError(f"{name}: '{idx_path}' has version {version}; Megatron reads version 1")
        if dtype_code not in {dtype.value for dtype in DType}:
            raise ValueError(f"{name}: '{idx_path}' has the unknown token type {dtype_code}")
        if num_sequences == 0:
            raise ValueError(f"{name}: '{idx_path}' lists no sequences; a data set needs at least one")

        pointers_at = len(header) + num_sequences * _LENGTH.size
        boundaries_at = pointers_at + num_sequences * _POINTER.size
        idx_size_needed = boundaries_at + num_boundaries * _POINTER.size
        if idx_size < idx_size_needed:
            raise ValueError(
                f"{name}: '{idx_path}' has {idx_size} bytes where {num_sequences} sequences need {idx_size_needed}"
            )
        file.seek(boundaries_at - _POINTER.size)
        (last_pointer,) = _POINTER.unpack(file.read(_POINTER.size))

    lengths = numpy.memmap(idx_path, numpy.dtype("<i4"), "r", len(header), (num_sequences,))
    if lengths.min() < 0:
        raise ValueError(f"{name}: '{idx_path}' lists a sequence of {lengths.min()} tokens; none can have fewer than 0")
    # Sequences lie one after the other, so the last one ends where the data end.
    token_size = DType.size(dtype_code)
    bin_size_needed = last_pointer + int(lengths[-1]) * token_size
    if bin_size < bin_size_needed:
        raise ValueError(
            f"{name}: '{bin_path}' has {bin_size} bytes where its index '{idx_path}' needs {bin_size_needed}"
        )
    dtype = numpy.dtype(DType.dtype_from_code(dtype_code)).newbyteorder("<")
    return IndexedTokens(prefix, lengths, numpy.memmap(bin_path, dtype, "r", shape=(bin_size // token_size,)))


def check_file(path: str, name: str, rule: str) -> int:
    """Require a readable file that is not empty, and return its size in bytes."""
    if not os.path.isfile(path):
        raise ValueError(f"{name}: '{path}' does not exist; {rule}")
    size = os.path.getsize(path)
    if size == 0:
        raise ValueError(f"{name}: '{path}' is empty; {rule}")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{name}: '{path}' is not readable; {rule}")
    return size


def check_token_ids(dataset: IndexedTokens, name: str, vocab_size: int, num_blocks: int = SCANNED_BLOCKS) -> None:
    """Refuse token ids that the embedding does not have. At most ``num_blocks`` blocks, spread evenly, are searched."""
    tokens = dataset.tokens
    has_room = tokens.dtype.kind not in "iu" or numpy.iinfo(tokens.dtype).max >= vocab_size
    if vocab_size == 0 or not has_room:
        return
    block_size = _BLOCK_BYTES // tokens.itemsize
    starts = range(0, len(tokens), block_size)
    if len(starts) > num_blocks:
        starts = numpy.linspace(0, len(tokens) - block_size, num_blocks).astype(int)
    for start in starts:
        block = tokens[start : start + block_size]
        lowest, highest = block.min(), block.max()
        if lowest < _PAD_ID or highest >= vocab_size:
            raise ValueError(
                f"{name}: '{get_bin_path(dataset.prefix)}' holds the token id "
                f"{highest if highest >= vocab_size else lowest}, and the model's vocabulary has the ids 0 to "
                f"{vocab_size - 1}: give the tokenizer (--vocab-size, --tokenizer-model) that made the data"
            )
