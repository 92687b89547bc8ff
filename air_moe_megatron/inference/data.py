"""Data to measure a model on: one stream of tokens, cut into windows of the model's sequence length.

Every token but the first is predicted exactly once. Windows do not overlap, except that the last one begins earlier so
that it is as long as the others. The tokens that it repeats do not count.
"""

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import torch
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

from air_moe_megatron.command.arguments import padded_vocab_size
from air_moe_megatron.command.indexed_dataset import check_token_ids, read_indexed_dataset
from air_moe_megatron.inference.text import ByteTokenizer, IdTokenizer, Tokenizer, num_bytes

_BLOCK = 2**20  # tokens that are processed together


@dataclass(frozen=True)
class TokenStream:
    """The documents of a data set, one after the other."""

    path: str
    tokens: numpy.ndarray  # [N] ids
    num_bytes: int | None  # of the text of all tokens but the first; None if the tokenizer does not tell


def require_paths(args: argparse.Namespace) -> None:
    """Refuse a command line without data.

    Raises:
        ValueError: naming the flag.
    """
    if not args.data_path:
        raise ValueError(
            "--data-path must name the data: prefixes of indexed data sets, text files, or files that end in .jsonl"
        )


def read(path: str, tokenizer: Tokenizer, args: argparse.Namespace, max_tokens: int | None = None) -> TokenStream:
    """Read a data set.

    Args:
        path: prefix of a Megatron indexed data set; or a text file, which is one document; or a file that ends in
            .jsonl, whose lines are objects with a document under "text". An end-of-document id follows each of these.
        tokenizer: the model's tokenizer.
        args: as ``restore.complete_arguments`` returns them.
        max_tokens: largest number of tokens to read; None means all.
    Raises:
        ValueError: naming the path and what is wrong with it.
    """
    name = f"--data-path entry '{path}'"
    if os.path.isfile(path) and not path.endswith((".bin", ".idx")):
        documents = _documents(path, name)
        tokens, size = _tokenize(documents, tokenizer, path.endswith(".jsonl"), max_tokens)
    else:
        dataset = read_indexed_dataset(path, name)
        check_token_ids(dataset, name, padded_vocab_size(args))
        tokens = dataset.tokens[: int(dataset.lengths.sum(dtype=numpy.int64))][:max_tokens]
        size = _bytes_of(tokens, tokenizer)
    if len(tokens) < args.seq_length + 1:
        raise ValueError(
            f"{name} holds {len(tokens)} tokens, and a window of --seq-length ({args.seq_length}) takes "
            f"{args.seq_length + 1}: give more data, or a smaller --seq-length"
        )
    return TokenStream(path, tokens, None if size is None else size - num_bytes(tokenizer, tokens[:1]))


def _documents(path: str, name: str) -> Iterator[str]:
    with open(path, encoding="utf-8", newline="") as file:
        try:
            if not path.endswith(".jsonl"):
                yield file.read()
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _text_of(line, f"{name}, line {number}")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is neither a text file in UTF-8 nor the prefix of an indexed data set") from error


def _text_of(line: str, name: str) -> str:
    """The document of a line of a .jsonl file."""
    try:
        text = json.loads(line)["text"]
        text.encode()
    except UnicodeEncodeError as error:
        found = repr(text[error.start])
        raise ValueError(f'{name}: the string under "text" must be UTF-8, without the surrogate {found}') from error
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{name}: {line.strip()[:40]!r} is no JSON object with a string under "text"') from error
    return text


def _tokenize(
    documents: Iterator[str], tokenizer: Tokenizer, has_ends: bool, max_tokens: int | None
) -> tuple[numpy.ndarray, int | None]:
    """The first tokens of documents, and the bytes of their text as it was read; None if the ids have no text.

    A tokenizer may add tokens to the text and lose parts of it, so the bytes are not counted in its tokens. Only a
    document that ``max_tokens`` cuts counts in proportion to the text of its tokens.
    """
    end = [tokenizer.eod] if has_ends else []
    parts, num_tokens, size = [numpy.empty(0, dtype=numpy.int64)], 0, 0
    for text in documents:
        ids = [*tokenizer.tokenize(text), *end]
        kept = ids if max_tokens is None else ids[: max_tokens - num_tokens]
        parts.append(numpy.array(kept, dtype=numpy.int64))
        num_tokens += len(kept)
        if not isinstance(tokenizer, IdTokenizer):
            is_cut = len(kept) < len(ids)
            share = num_bytes(tokenizer, kept) / max(1, num_bytes(tokenizer, ids)) if is_cut else 1
            size += round(share * len(text.encode()))
        if num_tokens == max_tokens:
            break
    return numpy.concatenate(parts), None if isinstance(tokenizer, IdTokenizer) else size


def _bytes_of(tokens: numpy.ndarray, tokenizer: Tokenizer) -> int | None:
    """Bytes of the text of tokens; None if unknown. Documents are detokenized one by one."""
    if isinstance(tokenizer, ByteTokenizer):
        blocks = range(0, len(tokens), _BLOCK)
        return sum(int((tokens[start : start + _BLOCK] < ByteTokenizer.vocab_size - 1).sum()) for start in blocks)
    ends = (numpy.flatnonzero(numpy.asarray(tokens) == tokenizer.eod) + 1).tolist()
    total = 0
    for start, end in zip([0, *ends], [*ends, len(tokens)], strict=True):
        found = num_bytes(tokenizer, tokens[start:end])
        if found is None:
            return None
        total += found
    return total


class Windows(torch.utils.data.Dataset):
    """Windows of a stream, in the form of samples of Megatron's data sets.

    Args:
        tokens: [N] ids, more than ``args.seq_length``.
        eod: id of the end of a document.
        args: with ``seq_length`` and Megatron's settings of positions and attention masks within a sample. Every token
            counts in the loss, whatever ``eod_mask_loss`` says.

    Example: with 8 tokens, windows of 3 predict the tokens 1 to 3, 4 to 6, and 7. The last window holds 4, 5 and 6.
    """

    def __init__(self, tokens: numpy.ndarray, eod: int, args: argparse.Namespace) -> None:
        self.tokens, self.eod, self.length = tokens, eod, args.seq_length
        self.settings = (
            args.reset_position_ids,
            args.reset_attention_mask,
            False,  # eod_mask_loss
            args.create_attention_mask_in_dataloader,
        )

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.length)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return a window. Indices beyond the last one start over, with windows that do not count."""
        first = index % len(self) * self.length
        start = min(first, len(self.tokens) - 1 - self.length)
        window = torch.from_numpy(self.tokens[start : start + self.length + 1].astype(numpy.int64))
        inputs, labels = window[:-1].contiguous(), window[1:].contiguous()
        attention_mask, loss_mask, position_ids = _get_ltor_masks_and_position_ids(inputs, self.eod, *self.settings)
        loss_mask[: first - start] = 0.0
        if index >= len(self):
            loss_mask.zero_()
        sample = {"tokens": inputs, "labels": labels, "loss_mask": loss_mask, "position_ids": position_ids}
        return sample if attention_mask is None else sample | {"attention_mask": attention_mask}


def microbatches(
    windows: Windows, micro_batch_size: int, rank: int, num_ranks: int
) -> Iterator[dict[str, torch.Tensor]]:
    """The windows of one data-parallel rank. All ranks get equally many microbatches.

    Args:
        windows: windows of the data set.
        micro_batch_size: windows in a microbatch.
        rank: data-parallel rank.
        num_ranks: number of data-parallel ranks.
    """
    for number in range(num_microbatches(windows, micro_batch_size, num_ranks)):
        first = (number * num_ranks + rank) * micro_batch_size
        yield torch.utils.data.default_collate([windows[first + i] for i in range(micro_batch_size)])


def num_microbatches(windows: Windows, micro_batch_size: int, num_ranks: int) -> int:
    """Number of microbatches of each data-parallel rank."""
    return -(-len(windows) // (micro_batch_size * num_ranks))
