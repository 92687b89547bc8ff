"""Convert text to token ids and back, in the way in which the checkpoint's training data were made."""

import argparse
import os
from collections.abc import Sequence

from megatron.core.tokenizers import MegatronTokenizer
from megatron.training import get_tokenizer

from air_moe_megatron.command.console import flag_of

_NUM_BYTES = 256
_FILE_TOKENIZERS = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer")
"""Tokenizers whose model is a file; a HuggingFace model may be a name too."""


class ByteTokenizer:
    """UTF-8 bytes as the ids 0 to 255, with the methods that Megatron's inference calls.

    For models that were trained on bytes with Megatron's NullTokenizer and 257 ids, as ``examples/prepare_stdlib.py``
    makes them.

    Example: "hi" is [104, 105], and [104, 105, 256] is "hi" again: 256, the end of a document, has no text.
    """

    vocab_size = _NUM_BYTES + 1
    bos = None

    def __init__(self, eod: int = _NUM_BYTES) -> None:
        self.eod = eod

    def tokenize(self, text: str) -> list[int]:
        """Ids of the bytes. Bytes that Python could not decode from the command line are kept.

        Raises:
            ValueError: if the text holds a lone surrogate, which has no bytes.
        """
        return list(text.encode("utf-8", "surrogateescape"))

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of the bytes. Invalid UTF-8 becomes the replacement character."""
        return self.to_bytes(ids).decode("utf-8", "replace")

    def to_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes, without the end of a document."""
        return bytes(token for token in ids if token < _NUM_BYTES)


class IdTokenizer:
    """Token ids as decimal numbers separated by white space, which is NullTokenizer's form of text."""

    bos = None

    def __init__(self, vocab_size: int, eod: int) -> None:
        self.vocab_size, self.eod = vocab_size, eod

    def tokenize(self, text: str) -> list[int]:
        """Ids of the numbers.

        Raises:
            ValueError: if a word is not an id of the vocabulary.
        """
        words = text.split()
        wrong = [word for word in words if not word.isdecimal() or int(word) >= self.vocab_size]
        if wrong:
            raise ValueError(
                f"{wrong[0]!r} is no token id: NullTokenizer with --vocab-size {self.vocab_size} takes numbers from 0 "
                f"to {self.vocab_size - 1}, separated by spaces (257 ids are taken for bytes and the end of a document)"
            )
        return [int(word) for word in words]

    def detokenize(self, ids: Sequence[int]) -> str:
        """The numbers, separated by spaces."""
        return " ".join(str(token) for token in ids)


Tokenizer = ByteTokenizer | IdTokenizer | MegatronTokenizer


def check_tokenizer_files(values: dict[str, object], given: argparse.Namespace) -> None:
    """Refuse a tokenizer if the checkpoint names files of it that do not exist here.

    Args:
        values: the arguments of the checkpoint.
        given: those of the command line.
    Raises:
        ValueError: naming the flag and the path.
    """
    names = ["vocab_file", "merge_file", "metadata_path"]
    names += ["tokenizer_model"] if values.get("tokenizer_type") in _FILE_TOKENIZERS else []
    for name in names:
        path = getattr(given, name, None) or values.get(name)
        if isinstance(path, str) and not os.path.isfile(path):
            flag = "--tokenizer-metadata" if name == "metadata_path" else flag_of(name)
            raise ValueError(f"{flag} '{path}' of the checkpoint does not exist here: give the flag with its place")


def tokenizer_of(args: argparse.Namespace) -> Tokenizer:
    """The tokenizer of a model. NullTokenizer with 257 ids means bytes.

    Args:
        args: as returned by ``restore.complete_arguments``, which has built Megatron's tokenizer.
    """
    if args.tokenizer_type != "NullTokenizer":
        return get_tokenizer()
    eod = get_tokenizer().eod
    return ByteTokenizer(eod) if args.vocab_size == ByteTokenizer.vocab_size else IdTokenizer(args.vocab_size, eod)


def num_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> int | None:
    """Number of bytes of the text of tokens, without special ones; None if ids have no text.

    Example: [104, 105, 256] of byte-level data have 2.
    """
    if isinstance(tokenizer, IdTokenizer):
        return None
    if isinstance(tokenizer, ByteTokenizer):
        return sum(int(token) < _NUM_BYTES for token in ids)
    ids = [int(token) for token in ids if token != tokenizer.eod]
    return len(tokenizer.detokenize(ids, skip_special_tokens=True).encode())
