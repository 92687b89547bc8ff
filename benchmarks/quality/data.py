"""The corpora of the quality study as Megatron data sets, in bytes or by a BPE that is trained on the training text.

Each corpus becomes a folder with {train,valid,test}.{bin,idx}, tokenizer.json and meta.json. The sizes in meta.json
convert Megatron's loss, in nats per token, to figures that are comparable across tokenizers: perplexity per word and
bits per byte.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from benchmarks.quality.study import BYTES

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
_STDLIB_EOD = 256  # of the byte-level data set that examples/prepare_stdlib.py makes
_WIKI_TITLE = re.compile(r"(?=^ = [^=].* = $)", re.MULTILINE)
_OWN_FILES = ("meta.json", "tokenizer.json", *(f"{split}.{ending}" for split in SPLITS for ending in ("bin", "idx")))
_TOKENIZER_BYTES = 20 * 2**20  # of training text that the tokenizer is trained on, at most


@dataclass(frozen=True)
class Meta:
    """Sizes of a prepared corpus."""

    corpus: str
    vocabulary: int  # token ids; the last one ends a document
    tokens: dict[str, int]  # of each split, ends of documents included
    bytes: dict[str, int]  # of text
    words: dict[str, int] | None  # words between white space, and one per line end; None for code and bytes


def prepare(corpus: str, vocabulary: int, source: Path, out: Path) -> Meta:
    """Make a corpus' data sets, unless they exist already.

    Args:
        corpus: "stdlib", "wikitext-2" or "gutenberg-100m".
        vocabulary: number of token ids, the end of a document included. 257 means bytes without a tokenizer.
        source: for "stdlib" the folder that ``make data`` fills; else the folder that holds the unpacked corpora.
        out: folder for the data sets.
    Raises:
        ValueError: if the corpus is unknown, the vocabulary is invalid, files are missing in the source, or the folder
            holds anything but a prepared corpus.
    """
    if corpus not in _READERS:
        raise ValueError(f"corpus ({corpus!r}) must be one of {', '.join(_READERS)}")
    if not isinstance(vocabulary, int) or isinstance(vocabulary, bool) or vocabulary < 2:
        raise ValueError(f"vocabulary ({vocabulary!r}) must be a whole number of at least 2")
    meta_file = out / "meta.json"
    if meta_file.is_file():
        meta = Meta(**json.loads(meta_file.read_text()))
        if (meta.corpus, meta.vocabulary) == (corpus, vocabulary):
            return meta
    _remove(out)
    out.mkdir(parents=True, exist_ok=True)
    read, is_prose = _READERS[corpus]
    if vocabulary == BYTES:
        encode = _bytes
    else:
        tokenizer = _train_tokenizer((text for text in read(source, "train")), vocabulary - 1)
        tokenizer.save(str(out / "tokenizer.json"))
        encode = partial(_ids, tokenizer)
    sizes = {split: _write(read(source, split), encode, vocabulary, out / split) for split in SPLITS}
    tokens, num_bytes, words = ({split: sizes[split][i] for split in SPLITS} for i in range(3))
    meta = Meta(corpus, vocabulary, tokens, num_bytes, words if is_prose and vocabulary != BYTES else None)
    meta_file.write_text(json.dumps(asdict(meta), indent=2) + "\n")  # last, as a mark that all is complete
    logger.info("%s: %s tokens of %s in %s", corpus, f"{tokens['train']:,}", vocabulary, out)
    return meta


def _remove(out: Path) -> None:
    """Remove only those files from a folder that this module has written earlier."""
    if not out.exists():
        return
    foreign = [path.name for path in out.iterdir() if path.name not in _OWN_FILES and path.name not in SPLITS]
    if foreign:
        raise ValueError(
            f"{out} holds {sorted(foreign)[0]}, which is no part of a prepared corpus: name another folder"
        )
    for split in SPLITS:
        shutil.rmtree(out / split, ignore_errors=True)  # Megatron's cached shuffling of earlier data
    for name in _OWN_FILES:
        (out / name).unlink(missing_ok=True)


def _train_tokenizer(texts, num_ids):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_ids,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<unk>"],  # WikiText's own mark of rare words; it occurs in no other corpus
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_bytes(texts, _TOKENIZER_BYTES), trainer)
    if tokenizer.get_vocab_size() != num_ids:
        raise ValueError(f"vocabulary: the training text gives {tokenizer.get_vocab_size()} token ids, not {num_ids}")
    return tokenizer


def _first_bytes(texts, limit):
    for text in texts:
        if limit <= 0:
            return
        yield text[:limit]
        limit -= len(text)


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def _bytes(text: str) -> list[int]:
    return list(text.encode())


def _write(
    texts: Iterator[str], encode: Callable[[str], list[int]], vocabulary: int, prefix: Path
) -> tuple[int, int, int]:
    """Write one split; returns its tokens, bytes and words. If it has several documents, each ends with the last id."""
    dtype = DType.optimal_dtype(vocabulary)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    texts = list(texts)
    end = [vocabulary - 1] if len(texts) > 1 else []
    num_tokens = num_bytes = num_words = 0
    for text in texts:
        tokens = numpy.array(encode(text) + end, dtype=dtype)
        builder.add_document(tokens, [len(tokens)])
        num_tokens += len(tokens)
        num_bytes += len(text.encode())
        num_words += len(text.split()) + text.count("\n")
    builder.finalize(f"{prefix}.idx")
    return num_tokens, num_bytes, num_words


def _stdlib(source: Path, split: str) -> Iterator[str]:
    prefix = source / f"stdlib_{split}"
    _require(prefix.with_suffix(".idx"), "run `make data`")
    for document in IndexedDataset(str(prefix)):
        yield document[document != _STDLIB_EOD].astype(numpy.uint8).tobytes().decode(errors="replace")


def _wikitext(source: Path, split: str) -> Iterator[str]:
    path = _require(source / "wikitext-2" / f"wiki.{split}.tokens", "unpack wikitext-2 there")
    text = path.read_text(encoding="utf-8")
    # For training, each article is a document. Measured text is one document, as is usual.
    yield from [part for part in _WIKI_TITLE.split(text) if part.strip()] if split == "train" else [text]


def _gutenberg(source: Path, split: str) -> Iterator[str]:
    path = _require(source / "gutenberg-100m" / f"{split}.jsonl", "unpack gutenberg-100m there")
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def _require(path: Path, what: str) -> Path:
    if not path.is_file():
        raise ValueError(f"{path} is missing: {what}")
    return path


_READERS = {"stdlib": (_stdlib, False), "wikitext-2": (_wikitext, True), "gutenberg-100m": (_gutenberg, True)}
