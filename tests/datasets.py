"""Small indexed data sets, as Megatron's preprocessing writes them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy


def write_indexed(
    prefix: str | Path,
    documents: Iterable[Sequence[int] | numpy.ndarray],
    dtype: type = numpy.uint16,
    lengths: Sequence[Sequence[int]] | None = None,
) -> str:
    """Write ``<prefix>.bin`` and ``<prefix>.idx``.

    Args:
        documents: the token ids of each document.
        dtype: of the token ids in the file.
        lengths: of the sequences that each document consists of; None means that each is one sequence.
    Returns:
        The prefix, as ``--data-path`` takes it.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path

    documents = [numpy.asarray(document) for document in documents]
    lengths = [[len(document)] for document in documents] if lengths is None else lengths
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=dtype)
    for document, parts in zip(documents, lengths, strict=True):
        builder.add_document(document, list(parts))
    builder.finalize(get_idx_path(str(prefix)))
    return str(prefix)
