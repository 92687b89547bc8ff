"""Token ids decoded for a reader, by the tokenizer that the run's own arguments name."""

import warnings
from argparse import Namespace
from collections.abc import Iterable
from typing import Any

from air_moe_megatron.report.runs import Run

_BYTES = 257
"""Vocabulary of byte-level data with NullTokenizer: 256 bytes, and the end of a document."""

# Further arguments that Megatron's build_tokenizer reads, with the defaults of their flags.
_DEFAULTS = {
    "chat_template": None,
    "merge_file": None,
    "metadata_path": None,
    "pad_vocab_size": False,
    "sft_tokenizer_prompt_format": "nemotron-h-aligned",
    "special_tokens": None,
    "tiktoken_num_special_tokens": 1000,
    "tiktoken_pattern": None,
    "tokenizer_hf_no_include_special_tokens": False,
    "tokenizer_hf_no_use_fast": False,
    "tokenizer_prompt_format": None,
    "tokenizer_sentencepiece_ignore_extra_whitespaces": True,
    "tokenizer_sentencepiece_legacy": False,
    "trust_remote_code": False,
    "vocab_file": None,
}


def texts_of(run: Run, ids: Iterable[int]) -> tuple[dict[int, str], str | None]:
    """Texts of token ids, and a note if they cannot be decoded.

    Loads Megatron for tokenizers other than NullTokenizer. Code from a model's folder is never run.

    Args:
        ids: ids of the run's tokenizer.
    Returns:
        id -> text; a note that says why ids could not be decoded, or None.

    Example: ids 97, 10 and 256 of byte-level data are "a", "\\\\n" and "end of document".
    """
    ids = sorted(set(ids))
    tokenizer = run.header.get("tokenizer") or {}
    kind = tokenizer.get("type")
    if not ids:
        return {}, None
    if kind == "NullTokenizer":
        if tokenizer.get("vocab_size") == _BYTES:
            return {number: _byte(number) for number in ids}, None
        return _plain(ids), "the run's NullTokenizer knows no texts, so tokens are shown as ids"
    try:
        built = _build(run, tokenizer)
        return {number: visible(_text(built, number)) for number in ids}, None
    except Exception as error:  # libraries raise errors of any kind; the page then has a note instead of texts
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return _plain(ids), f"the run's {kind} could not be built here, so tokens are shown as ids ({reason})"


def _build(run: Run, tokenizer: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's, on import
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

        recorded = {name: run.argument(name, default) for name, default in _DEFAULTS.items()}
        own = {
            "tokenizer_type": tokenizer.get("type"),
            "tokenizer_model": tokenizer.get("model"),
            "vocab_size": tokenizer.get("vocab_size"),
        }
        return build_tokenizer(Namespace(**{**recorded, **own, "trust_remote_code": False, "pad_vocab_size": False}))


def _text(tokenizer: Any, number: int) -> str:
    """The text of a token behind another one: many tokenizers drop the space before the first token."""
    first, both = tokenizer.detokenize([number]), tokenizer.detokenize([number, number])
    return both.removeprefix(first) if both.startswith(first) else first


def _plain(ids: list[int]) -> dict[int, str]:
    return {number: f"#{number}" for number in ids}


def _byte(number: int) -> str:
    if number == _BYTES - 1:
        return "end of document"
    return visible(chr(number)) if number < 128 else f"\\x{number:02x}"


def visible(text: str) -> str:
    """A token's text with invisible characters made visible.

    Example: " the" is "␣the"; a line feed is "\\\\n".
    """
    shown = "".join("␣" if char == " " else char if char.isprintable() else _escaped(char) for char in text)
    return shown or "(empty)"


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()
