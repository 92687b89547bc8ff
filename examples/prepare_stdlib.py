"""Make a byte-level Megatron data set from the source text of this Python's standard library.

    python examples/prepare_stdlib.py --out data/stdlib

Writes OUT/stdlib_train, OUT/stdlib_valid and OUT/stdlib_test, each a pair .bin, .idx. A document is one source file:
its bytes as token ids 0 to 255, then the end-of-document token 256. A file belongs to one split only, chosen by a hash
of its name: about 90% train, 5% validation, 5% test, and the same on every machine with the same files.

The flags that go with the data:

    --tokenizer-type NullTokenizer --vocab-size 257
    --train-data-path OUT/stdlib_train --valid-data-path OUT/stdlib_valid --test-data-path OUT/stdlib_test

NullTokenizer takes --vocab-size as it is (nothing is added to it) and its last id as the end of a document, which is
256 here; --null-tokenizer-eod-id would say otherwise. The embedding is then padded to a multiple of
--make-vocab-size-divisible-by, which is 128 by default: 384 rows.

Megatron prints `lm loss` in nats per token, here nats per byte: bits per byte = lm loss / ln 2 = 1.4427 * lm loss. The
PPL beside it is exp(lm loss), the perplexity per byte. (The end of a document counts as a token and is no byte of the
text: about 1 token in 17,000.)
"""

import argparse
import hashlib
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import numpy
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, get_bin_path, get_idx_path

EOD = 256
SPLITS = ("train", "valid", "test")
EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


def source_files(root: Path, with_tests: bool) -> list[Path]:
    """List the Python files below a folder.

    Args:
        root: the standard library's folder.
        with_tests: keep the folders of tests too.
    Returns:
        Paths relative to `root`, sorted by their POSIX form.
    """
    excluded = EXCLUDED_FOLDERS if with_tests else EXCLUDED_FOLDERS | TEST_FOLDERS
    files = (path.relative_to(root) for path in root.rglob("*.py") if path.is_file())
    return sorted((file for file in files if excluded.isdisjoint(file.parts)), key=Path.as_posix)


def split_of(file: Path) -> str:
    """Choose the split of a file by a hash of its name.

    Args:
        file: path relative to the standard library's folder.
    Returns:
        "train" for about 90 of 100 names, "valid" and "test" for about 5 each.
    """
    percentile = int.from_bytes(hashlib.sha256(file.as_posix().encode()).digest()[:8]) % 100
    return "train" if percentile < 90 else "valid" if percentile < 95 else "test"


def write_split(root: Path, files: list[Path], prefix: Path) -> int:
    """Write one indexed data set under a temporary name, then move it into place.

    The .idx file comes last, so an interrupted run leaves no pair that looks complete and is not. Megatron's cached
    shuffling of earlier data goes: Megatron finds it by the name of the data set alone.

    Args:
        root: folder that `files` are relative to.
        files: documents, in order.
        prefix: where the pair goes, without .bin and .idx.
    Returns:
        The number of tokens written, end-of-document tokens included.
    """
    partial = f"{prefix}.partial-{os.getpid()}"
    dtype = DType.optimal_dtype(EOD + 1)
    builder = IndexedDatasetBuilder(get_bin_path(partial), dtype=dtype)
    num_tokens = 0
    try:
        for file in files:
            tokens = numpy.append(numpy.frombuffer((root / file).read_bytes(), dtype=numpy.uint8).astype(dtype), EOD)
            builder.add_document(tokens, [len(tokens)])
            num_tokens += len(tokens)
        builder.finalize(get_idx_path(partial))
        Path(get_idx_path(str(prefix))).unlink(missing_ok=True)
        shutil.rmtree(prefix / "cache", ignore_errors=True)
        os.replace(get_bin_path(partial), get_bin_path(str(prefix)))
        os.replace(get_idx_path(partial), get_idx_path(str(prefix)))
    finally:
        for path in (get_bin_path(partial), get_idx_path(partial)):
            Path(path).unlink(missing_ok=True)
    return num_tokens


def main() -> None:
    """Write the three data sets and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the data sets; made where missing")
    parser.add_argument("--with-tests", action="store_true", help="keep the standard library's own tests too")
    args = parser.parse_args()

    root = Path(sysconfig.get_path("stdlib"))
    files = source_files(root, args.with_tests)
    if not files:
        sys.exit(f"{root}: no Python source files; this Python has its standard library elsewhere, or without source")
    args.out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        chosen = [file for file in files if split_of(file) == split]
        prefix = args.out / f"stdlib_{split}"
        num_tokens = write_split(root, chosen, prefix)
        print(f"{prefix}: {len(chosen)} documents, {num_tokens:,} tokens (bytes and ends of documents)")


if __name__ == "__main__":
    main()
