"""Windows that predict every token once, bytes of texts, tokenizers, and what is refused before a model is built."""

import argparse
import json
import math
import re

import numpy
import pytest
import torch
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

from air_moe_megatron.inference import evaluation, generation
from air_moe_megatron.inference.data import Windows, microbatches, num_microbatches, read
from air_moe_megatron.inference.generation import text_after
from air_moe_megatron.inference.text import ByteTokenizer, IdTokenizer, check_tokenizer_files, num_bytes
from tests.datasets import write_indexed

SAMPLES = dict(
    seq_length=3,
    reset_position_ids=False,
    reset_attention_mask=False,
    eod_mask_loss=False,
    create_attention_mask_in_dataloader=False,
)


def make_args(**values):
    return argparse.Namespace(**{**SAMPLES, "padded_vocab_size": 257, "vocab_size": 257, **values})


@pytest.mark.parametrize("num_tokens", (4, 7, 8, 9, 10))
@pytest.mark.parametrize("num_ranks", (1, 2, 3))
def test_every_token_but_the_first_is_predicted_once_from_a_full_window(num_tokens, num_ranks):
    windows = Windows(numpy.arange(num_tokens), 256, make_args())
    counted, counts = [], set()
    for rank in range(num_ranks):
        batches = list(microbatches(windows, 2, rank, num_ranks))
        counts.add(len(batches))
        for batch in batches:
            assert batch["tokens"].shape == batch["labels"].shape == (2, 3)
            assert torch.equal(batch["labels"], batch["tokens"] + 1)
            counted += batch["labels"][batch["loss_mask"] > 0].tolist()
    assert sorted(counted) == list(range(1, num_tokens))
    assert counts == {num_microbatches(windows, 2, num_ranks)}


def test_the_last_window_begins_earlier_and_counts_what_is_new():
    window = Windows(numpy.arange(8), 256, make_args())[2]
    assert window["labels"].tolist() == [5, 6, 7] and window["loss_mask"].tolist() == [0, 0, 1]


def test_samples_follow_megatrons_settings():
    args = make_args(reset_position_ids=True, create_attention_mask_in_dataloader=True)
    window = Windows(numpy.array([1, 256, 3, 4]), 256, args)[0]
    assert window["position_ids"].tolist() == [0, 1, 0] and window["loss_mask"].tolist() == [1, 1, 1]
    assert window["attention_mask"].shape == (1, 3, 3)


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def write_lines(folder, texts):
    return write(folder, "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_texts_are_read_with_their_bytes(tmp_path):
    stream = read(write(tmp_path, "a.txt", "äbc"), ByteTokenizer(), make_args())
    assert stream.tokens.tolist() == [*"äbc".encode()] and stream.num_bytes == 3  # the first byte is not predicted
    stream = read(write_lines(tmp_path, ["ab", "c"]), ByteTokenizer(), make_args())
    assert stream.tokens.tolist() == [97, 98, 256, 99, 256] and stream.num_bytes == 2
    stream = read(str(tmp_path / "a.jsonl"), ByteTokenizer(), make_args(), max_tokens=4)
    assert len(stream.tokens) == 4


def test_texts_keep_their_carriage_returns(tmp_path):
    text = b"ab\r\ncd\re\n"
    (tmp_path / "a.txt").write_bytes(text)
    stream = read(str(tmp_path / "a.txt"), ByteTokenizer(), make_args())
    assert stream.tokens.tolist() == list(text) and stream.num_bytes == len(text) - 1
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ab"}\r\n{"text": "c"}\r\n')
    stream = read(str(tmp_path / "a.jsonl"), ByteTokenizer(), make_args())
    assert stream.tokens.tolist() == [97, 98, 256, 99, 256]


@pytest.mark.parametrize("eod_mask_loss", (False, True))
def test_the_bytes_are_those_of_the_tokens_that_count(tmp_path, eod_mask_loss):
    args = make_args(eod_mask_loss=eod_mask_loss)
    stream = read(write_lines(tmp_path, ["ab", "cde", "f"] * 5), ByteTokenizer(), args)
    windows = Windows(stream.tokens, 256, args)
    windows = [windows[index] for index in range(len(windows))]
    counted = torch.cat([window["labels"][window["loss_mask"] > 0] for window in windows]).tolist()
    assert counted == stream.tokens[1:].tolist()
    assert sum(token < 256 for token in counted) == stream.num_bytes


def test_indexed_data_are_read_as_their_text_is(tmp_path):
    stream = read(write_indexed(tmp_path / "x", [[97, 98, 256], [99, 256]]), ByteTokenizer(), make_args())
    assert stream.tokens.tolist() == [97, 98, 256, 99, 256] and stream.num_bytes == 2
    ids = read(str(tmp_path / "x"), IdTokenizer(300, 256), make_args())
    assert ids.num_bytes is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: str(folder / "none"), "none.idx' does not exist; a Megatron indexed data set is a pair"),
        (lambda folder: write_indexed(folder / "x", []), "x.bin' is empty; a Megatron indexed data set"),
        (
            lambda folder: write_indexed(folder / "x", [[1, 2]]),
            r"holds 2 tokens, and a window of --seq-length \(3\) takes 4",
        ),
        (lambda folder: write_indexed(folder / "x", [[1, 300, 2, 3, 4]]), "holds the token id 300"),
        (lambda folder: write(folder, "a.jsonl", '{"body": 3}\n'), 'is no JSON object with a string under "text"'),
        (
            lambda folder: write(folder, "a.jsonl", '{"text": "a"}\n\n{"text": null}\n'),
            r"""a.jsonl', line 3: '{"text": null}' is no JSON object with a string under "text"$""",
        ),
        (
            lambda folder: write(folder, "a.jsonl", '{"text": "a"}\n{"text": "b\\udc80"}\n'),
            r"""a.jsonl', line 2: the string under "text" must be UTF-8, without the surrogate '\\udc80'$""",
        ),
        (lambda folder: write(folder, "a.txt", ""), "holds 0 tokens"),
    ],
    ids=["absent", "no-document", "short", "foreign-id", "no-text", "null", "surrogate", "empty"],
)
def test_data_that_cannot_be_measured_are_refused(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        read(make(tmp_path), ByteTokenizer(), make_args())


def test_bytes_go_to_ids_and_back():
    tokenizer = ByteTokenizer()
    broken = b"a\xff".decode("utf-8", "surrogateescape")  # as a shell passes it
    assert tokenizer.tokenize(broken) == [97, 255]
    assert tokenizer.detokenize([195, 164, 256, 255]) == "ä�"
    assert IdTokenizer(10, 9).tokenize("3 9") == [3, 9] and IdTokenizer(10, 9).detokenize([3, 9]) == "3 9"


@pytest.fixture(params=["plain", "begin"])
def trained_tokenizer(tmp_path, request):
    """A byte-level BPE as a folder for HuggingFaceTokenizer, by Megatron; "begin": it adds a token to each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=271, special_tokens=["<end>", "<begin>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the cat, the hat and the mat"] * 4, trainer)
    if request.param == "begin":
        template = {"single": "<begin> $A", "special_tokens": [("<begin>", 1)]}
        tokenizer.post_processor = processors.TemplateProcessing(**template)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "bos_token": "<begin>"}
    write(tmp_path, "tokenizer_config.json", json.dumps(settings))
    names = ("special_tokens", "vocab_file", "merge_file", "chat_template", "metadata_path")
    args = argparse.Namespace(
        **dict.fromkeys(names),
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(tmp_path),
        tokenizer_hf_no_use_fast=False,
        tokenizer_hf_no_include_special_tokens=False,
        trust_remote_code=False,
        pad_vocab_size=False,
    )
    return build_tokenizer(args)


def test_a_trained_tokenizer_tells_the_bytes_of_its_tokens(trained_tokenizer, tmp_path):
    text = "the cät and the hat"
    ids = trained_tokenizer.tokenize(text)
    assert len(ids) < len(text.encode()) and trained_tokenizer.detokenize(ids, skip_special_tokens=True) == text
    assert num_bytes(trained_tokenizer, [*ids, trained_tokenizer.eod]) == len(text.encode())
    first = num_bytes(trained_tokenizer, ids[:1])
    assert first == (0 if ids[0] == trained_tokenizer.bos else len("the"))
    stream = read(write(tmp_path, "a.txt", text), trained_tokenizer, make_args())
    assert stream.num_bytes == len(text.encode()) - first
    texts = [text, "a mat", "", "the hat"] * 5
    size = sum(len(one.encode()) for one in texts) - first
    stream = read(write_lines(tmp_path, texts), trained_tokenizer, make_args())
    assert stream.num_bytes == size
    documents = [[*trained_tokenizer.tokenize(one), trained_tokenizer.eod] for one in texts]
    indexed = read(write_indexed(tmp_path / "x", documents), trained_tokenizer, make_args(padded_vocab_size=512))
    assert indexed.tokens.tolist() == stream.tokens.tolist() and indexed.num_bytes == size


def test_documents_that_max_tokens_cuts_count_by_what_is_read(trained_tokenizer, tmp_path):
    path = write_lines(tmp_path, ["the hat", "the hat and the cat"])
    for number in range(4, 10):
        stream = read(path, trained_tokenizer, make_args(), max_tokens=number)
        assert len(stream.tokens) == number
        assert stream.num_bytes == num_bytes(trained_tokenizer, stream.tokens[1:])


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(tmp_path_factory):
    import sentencepiece

    tmp_path = tmp_path_factory.mktemp("sentencepiece")
    corpus = write(tmp_path, "corpus.txt", "the cat and the hat and the mat sat\n" * 200)
    sentencepiece.SentencePieceTrainer.train(
        input=corpus, model_prefix=str(tmp_path / "model"), vocab_size=30, hard_vocab_limit=False, minloglevel=2
    )
    names = ("special_tokens", "vocab_file", "metadata_path", "vocab_size", "tokenizer_prompt_format", "chat_template")
    return build_tokenizer(
        argparse.Namespace(
            **dict.fromkeys(names),
            tokenizer_type="SentencePieceTokenizer",
            tokenizer_model=str(tmp_path / "model.model"),
            tokenizer_sentencepiece_legacy=False,
            tokenizer_sentencepiece_ignore_extra_whitespaces=True,
            trust_remote_code=False,
            pad_vocab_size=False,
        )
    )


@pytest.mark.parametrize("text", ["the cat  and\n\tthe hat", "the zebra: a xyz"], ids=["spaces", "unknown"])
def test_bytes_are_those_of_the_text_also_if_the_tokens_lose_some(tmp_path, sentencepiece_tokenizer, text):
    stream = read(write_lines(tmp_path, [text] * 50), sentencepiece_tokenizer, make_args())
    assert stream.num_bytes == 50 * len(text.encode()) - num_bytes(sentencepiece_tokenizer, stream.tokens[:1])


def test_a_continuation_keeps_the_space_before_its_first_word(trained_tokenizer, sentencepiece_tokenizer):
    """SentencePiece drops the space before the first token that it decodes."""
    for tokenizer in (trained_tokenizer, sentencepiece_tokenizer, ByteTokenizer()):
        ids = list(tokenizer.tokenize("the cat and the hat"))
        for number in range(1, len(ids)):
            given, new = ids[:number], ids[number:]
            assert tokenizer.detokenize(given) + text_after(tokenizer, given, new) == tokenizer.detokenize(ids)
    assert text_after(IdTokenizer(10, 9), [1, 2], [3]) == " 3"
    assert (
        text_after(ByteTokenizer(), "ab\u00e4".encode()[:-1], "\u00e4".encode()[-1:]) == "\ufffd"
    )  # within a character


def test_files_of_a_tokenizer_that_are_not_here_are_named(tmp_path):
    saved = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "gone.model"}
    given = argparse.Namespace(tokenizer_model=None, vocab_file=None, merge_file=None, metadata_path=None)
    with pytest.raises(ValueError, match="--tokenizer-model 'gone.model' of the checkpoint does not exist here"):
        check_tokenizer_files(saved, given)
    given.tokenizer_model = write(tmp_path, "here.model", "x")
    check_tokenizer_files(saved, given)
    check_tokenizer_files({"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "org/name"}, given)


GENERATES = dict(
    tensor_model_parallel_size=1,
    pipeline_model_parallel_size=1,
    context_parallel_size=1,
    moe_expert_capacity_factor=None,
    num_tokens=8,
    temperature=0.0,
    top_k=0,
    top_p=0.0,
    max_position_embeddings=16,
    prompt=["ab"],
)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": ["a", ""]}, "--prompt '' is empty"),
        (
            {"prompt": ["123456789"]},
            "--prompt '123456789' has 9 tokens, and with --num-tokens (8) more than the positions",
        ),
        ({"prompt": ["\ud800x"]}, "--prompt '\\ud800x': 'utf-8' codec can't encode"),
        ({"num_tokens": 0}, "--num-tokens (0) must be at least 1"),
        ({"temperature": -1.0}, "--temperature (-1.0) must be 0, or from 1e-06 on"),
        ({"temperature": float("nan")}, "--temperature (nan) must be 0, or from 1e-06 on and finite"),
        ({"temperature": float("inf")}, "--temperature (inf) must be 0, or from 1e-06 on and finite"),
        ({"temperature": 1e-42}, "--temperature (1e-42) must be 0, or from 1e-06 on and finite"),
        ({"temperature": 1.0, "top_k": 257}, "--top-k (257) must be from 0 to below the number of token ids, 257"),
        ({"temperature": 1.0, "top_p": 1.5}, "--top-p (1.5) must be from 0 to 1"),
        ({"temperature": 1.0, "top_p": 0.5, "top_k": 3}, "--top-k (3) excludes --top-p (0.5)"),
        ({"top_k": 3}, "need --temperature above 0"),
        ({"tensor_model_parallel_size": 2}, "--tensor-model-parallel-size (2) must be 1"),
        ({"moe_expert_capacity_factor": 1.5}, "--moe-expert-capacity-factor (1.5) is not supported"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_generated_is_refused_by_flag_and_value(values, message):
    generation.check(argparse.Namespace(**GENERATES), ByteTokenizer())
    with pytest.raises(ValueError, match=re.escape(message)):
        generation.check(argparse.Namespace(**{**GENERATES, **values}), ByteTokenizer())


def test_a_prompt_of_ids_is_refused_where_it_holds_none():
    with pytest.raises(ValueError, match="--prompt 'a 3': 'a' is no token id: NullTokenizer with --vocab-size 64"):
        generation.check(argparse.Namespace(**{**GENERATES, "prompt": ["a 3"]}), IdTokenizer(64, 63))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data_path": None}, "--data-path must name the data"),
        ({"sft": True}, "--sft of the checkpoint is not supported"),
        ({"eod_mask_loss": True}, "--eod-mask-loss must be left out: every token"),
        ({"max_tokens": 1}, r"--max-tokens \(1\) must be at least 2"),
        ({"json": "no/such/folder/x.json"}, "--json 'no/such/folder/x.json': the folder does not exist"),
    ],
    ids=["no-data", "sft", "mask", "max-tokens", "json"],
)
def test_what_cannot_be_measured_is_refused(values, message):
    base = dict(
        data_path=["x"], sft=False, dataloader_inter_document_masking=False, eod_mask_loss=False, max_tokens=None,
        json=None,
    )  # fmt: skip
    evaluation.check(argparse.Namespace(**base))
    with pytest.raises(ValueError, match=message):
        evaluation.check(argparse.Namespace(**{**base, **values}))


def test_the_table_shows_data_sets_and_layers():
    layer = {"layer": 1, "router": "air", "experts": 16, "topk": 2, "experts_used": 0.5, "imbalance_factor": 1.25}
    layers = [layer | {"mass_recall": 0.25}, layer | {"layer": 2, "router": "hash"}]
    metrics = evaluation.Metrics("x", 1000, 2.0, math.e**2, None, None, layers)
    lines = evaluation.format_metrics("out", 7, [metrics]).splitlines()
    assert lines[0] == "out, iteration 7"
    assert lines[3].split() == ["x", "1,000", "2.0000", "7.389", "-", "-"]
    assert lines[-1].split() == ["2", "hash", "16", "2", "50.0%", "1.250", "-"]


def test_figures_that_cannot_be_written_are_refused_before_they_are_measured(tmp_path):
    from air_moe_megatron.inference.evaluation import check

    def problem(json):
        given = dict(data_path=["x"], sft=False, dataloader_inter_document_masking=False, eod_mask_loss=False)
        with pytest.raises(ValueError) as error:
            check(argparse.Namespace(**given, max_tokens=None, json=str(json)))
        return str(error.value)

    assert problem(tmp_path) == f"--json '{tmp_path}' must name a file: it is a folder"
    assert problem(tmp_path / "new" / "x") == f"--json '{tmp_path}/new/x': the folder does not exist"
    assert problem("/proc/x") == "--json '/proc/x' cannot be written: No such file or directory in '/proc'"
