"""The flag, the path and the rule are named for every data set that cannot be read."""

import argparse
import json
import struct
from pathlib import Path

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from air_moe_megatron.command import indexed_dataset
from air_moe_megatron.config import raise_first
from air_moe_megatron.training import preflight
from tests.datasets import write_indexed

HEADER_SIZE = 34
DATA_FLAGS = (
    "data_path",
    "data_args_path",
    "train_data_path",
    "valid_data_path",
    "test_data_path",
    "per_split_data_args_path",
)


RUN = dict(
    mock_data=False, sft=False, skip_train=False, train_iters=10, train_samples=None, eval_iters=0,
    full_validation=False, seq_length=4, split=None, padded_vocab_size=8, vocab_size=8, data_cache_path=None, rank=0,
)  # fmt: skip


def check_data(args):
    """Raise the first problem, as a start does."""
    raise_first(preflight.unfit_data(args))


def arguments(**given):
    """Arguments of a run that trains and does not evaluate; a blend is for training alone unless a split is given."""
    if given.keys() & {"data_path", "data_args_path"}:
        given = {"split": "1,0,0"} | given
    return argparse.Namespace(**dict.fromkeys(DATA_FLAGS) | RUN | given)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A data set of two documents, 5 tokens of 2 bytes each."""
    prefix = tmp_path / "text"
    write_indexed(prefix, [[0, 1], [0, 1, 2]], lengths=[[2], [1, 2]])
    return prefix


def edit(path: Path, offset: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)


def test_what_megatron_reads_passes(dataset, tmp_path):
    assert len(IndexedDataset(str(dataset))) == 3
    list_file = tmp_path / "list.txt"
    list_file.write_text(f"1.0 {dataset}\n")
    per_split_file = tmp_path / "splits.json"
    per_split_file.write_text(json.dumps({"train": ["1", str(dataset)], "valid": str(dataset), "test": None}))

    check_data(arguments(data_path=[str(dataset)]))
    check_data(arguments(data_path=["0.3", str(dataset), "0.7", str(dataset)]))
    check_data(arguments(data_path=[str(dataset)] * 2))
    check_data(arguments(train_data_path=[str(dataset)]))
    check_data(arguments(data_args_path=str(list_file)))
    check_data(arguments(per_split_data_args_path=str(per_split_file)))
    check_data(arguments(mock_data=True))


def test_object_storage_is_left_to_megatron():
    check_data(arguments(data_path=["s3://bucket/text"]))
    check_data(arguments(data_path=["1", "msc://profile/text", "2", "s3://bucket/text"]))


def test_a_cache_that_cannot_be_written_is_refused_on_rank_0(dataset):
    data = {"data_path": [str(dataset)]}
    check_data(arguments(**data, data_cache_path=str(dataset.with_name("new") / "cache")))
    assert not dataset.with_name("new").exists()
    dataset.touch()  # Megatron's own folder for it is beside the data, with the name of the prefix
    for given, name in (({}, f"its folder '{dataset}/cache'"), ({"data_cache_path": "/proc/x"}, "--data-cache-path")):
        with pytest.raises(ValueError, match=f"{name}.* cannot be written: .*: give --data-cache-path a folder"):
            check_data(arguments(**data, **given))
        check_data(arguments(**data, **given, rank=1))


def test_no_data_names_the_flags():
    with pytest.raises(ValueError, match="no data set is given: add --data-path .*--train-data-path .*--mock-data"):
        check_data(arguments())


@pytest.mark.parametrize("flag", ["data_path", "train_data_path", "valid_data_path", "test_data_path"])
def test_missing_index(flag, dataset):
    Path(f"{dataset}.idx").unlink()
    name = "--" + flag.replace("_", "-")
    with pytest.raises(ValueError, match=f"^{name} entry '{dataset}': '{dataset}.idx' does not exist; .*x.bin, x.idx"):
        check_data(arguments(skip_train=True, **{flag: [str(dataset)]}))


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_empty_file(ending, dataset):
    Path(f"{dataset}.{ending}").write_bytes(b"")
    with pytest.raises(ValueError, match=f"'{dataset}.{ending}' is empty"):
        check_data(arguments(data_path=[str(dataset)]))


def test_second_entry_of_a_blend_is_checked(dataset):
    with pytest.raises(ValueError, match="--data-path entry 'nowhere': 'nowhere.idx' does not exist"):
        check_data(arguments(data_path=["1", str(dataset), "2", "nowhere"]))


def test_weights_for_some_entries_only(dataset):
    with pytest.raises(ValueError, match="--data-path: give every prefix a weight before it, or none of them"):
        check_data(arguments(data_path=[str(dataset), str(dataset), "0.5", str(dataset)]))


def test_named_with_its_ending(dataset):
    with pytest.raises(ValueError, match=r"text.bin.idx' does not exist; .*named without its ending"):
        check_data(arguments(data_path=[f"{dataset}.bin"]))


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        pytest.param(0, b"NOTMEGA", "does not begin with", id="magic"),
        pytest.param(9, struct.pack("<Q", 2), "has version 2", id="version"),
        pytest.param(17, b"\xff", "unknown token type 255", id="dtype"),
        pytest.param(18, struct.pack("<Q", 0), "lists no sequences", id="no-sequences"),
        pytest.param(18, struct.pack("<Q", 2**40), "sequences need", id="sequence-count"),
        pytest.param(HEADER_SIZE + 2 * 4, struct.pack("<i", 9), "has 10 bytes where its index", id="long-sequence"),
        pytest.param(HEADER_SIZE + 2 * 4, struct.pack("<i", -2), "a sequence of -2 tokens", id="negative-last-length"),
        pytest.param(HEADER_SIZE, struct.pack("<i", -1), "a sequence of -1 tokens", id="negative-length"),
    ],
)
def test_damaged_index(offset, content, message, dataset):
    edit(Path(f"{dataset}.idx"), offset, content)
    with pytest.raises(ValueError, match=message):
        check_data(arguments(data_path=[str(dataset)]))


@pytest.mark.parametrize(
    ("size", "message"), [(HEADER_SIZE - 1, "ends within its header"), (HEADER_SIZE + 5, "sequences need")]
)
def test_truncated_index(size, message, dataset):
    path = Path(f"{dataset}.idx")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=message):
        check_data(arguments(data_path=[str(dataset)]))


def test_truncated_data(dataset):
    path = Path(f"{dataset}.bin")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="text.bin' has 9 bytes where its index '.*text.idx' needs 10"):
        check_data(arguments(data_path=[str(dataset)]))


def test_list_file(tmp_path):
    with pytest.raises(ValueError, match="--data-args-path 'nowhere.txt': 'nowhere.txt' does not exist"):
        check_data(arguments(data_args_path="nowhere.txt"))
    list_file = tmp_path / "list.txt"
    list_file.write_text("nowhere")
    with pytest.raises(ValueError, match="--data-args-path '.*list.txt' entry 'nowhere': 'nowhere.idx' does not"):
        check_data(arguments(data_args_path=str(list_file)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("train:", "not a JSON file", id="not-json"),
        pytest.param('{"train": null}', "keys valid, test are missing", id="missing-keys"),
        pytest.param("[1]", "keys train, valid, test are missing", id="not-an-object"),
        pytest.param(
            '{"train": null, "valid": "nowhere", "test": null}',
            r"splits.json' \(valid\) entry 'nowhere': 'nowhere.idx' does not exist",
            id="missing-data-set",
        ),
    ],
)
def test_per_split_file(content, message, tmp_path):
    path = tmp_path / "splits.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        check_data(arguments(per_split_data_args_path=str(path), skip_train=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mock_data": True, "data_path": ["x"]}, "--mock-data excludes --data-path"),
        ({"data_args_path": "x", "valid_data_path": ["x"]}, "--data-args-path excludes --valid-data-path"),
    ],
)
def test_two_sources(given, message):
    with pytest.raises(ValueError, match=message):
        check_data(arguments(**given))


def test_fine_tuning_reads_a_plain_file(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text('{"messages": []}\n')
    check_data(arguments(sft=True, train_data_path=[str(path)]))
    with pytest.raises(ValueError, match="'nowhere.jsonl' does not exist; with --sft it is a JSON Lines file"):
        check_data(arguments(sft=True, train_data_path=["nowhere.jsonl"]))


# Splits: the data set has sequences of 2, 1 and 2 tokens.

NOTHING_DRAWN = dict(eval_iters=0)
EVALUATED = dict(eval_iters=2)
REFUSED_SPLITS = {
    "no-document-evaluated": (
        dict(split="98,1,1", **EVALUATED),
        "--split 98,1,1 gives 0 of 3 sequences (documents) with 0 tokens to valid, which needs at least 1",
    ),
    "no-document-not-evaluated": (
        dict(split="98,1,1", **NOTHING_DRAWN),
        "--split 98,1,1 gives 0 of 3 sequences (documents) with 0 tokens to valid, which needs at least 5",
    ),
    "no-sample": (
        dict(split="1,1,1", **NOTHING_DRAWN),
        "--split 1,1,1 gives 1 of 3 sequences (documents) with 1 tokens to valid, which needs at least 5",
    ),
    "no-training": (dict(split="0,1,0", **EVALUATED), "--split 0,1,0 gives data to train"),
    "no-validation": (
        dict(split="1,0,0", **EVALUATED),
        "--split 1,0,0 gives data to valid, and --eval-iters (2) needs it",
    ),
    "not-numbers": (dict(split="most"), "--split (most) must be up to three numbers"),
    "all-zero": (dict(split="0,0,0"), "--split (0,0,0) must be up to three numbers"),
    "too-many": (dict(split="1,1,1,1"), "--split (1,1,1,1) must be up to three numbers"),
    "full-validation": (
        dict(split="1,1,0", full_validation=True, seq_length=16),
        "gives 1 of 3 sequences (documents) with 2 tokens to valid, which needs at least 17",
    ),
}


@pytest.mark.parametrize("settings, words", REFUSED_SPLITS.values(), ids=REFUSED_SPLITS)
def test_a_split_from_which_nothing_can_be_drawn_is_refused(dataset, settings, words):
    with pytest.raises(ValueError) as error:
        check_data(arguments(data_path=[str(dataset)], **settings))
    assert words in str(error.value)
    assert "--eval-iters 0" in str(error.value) or "--skip-train" in str(error.value) or "numbers" in str(error.value)


def test_a_split_that_is_smaller_than_a_sample_is_repeated_where_it_is_drawn_from(dataset):
    check_data(arguments(data_path=[str(dataset)], split="1,1,1", eval_iters=2, seq_length=1000))
    check_data(arguments(data_path=[str(dataset)], split="0,1,0", eval_iters=2, skip_train=True))


@pytest.mark.parametrize("prefixes", [lambda x: ["1", x, "2", x], lambda x: [x, x]], ids=["weighted", "by-size"])
def test_a_blend_from_which_nothing_is_drawn_is_refused(dataset, prefixes):
    blend = prefixes(str(dataset))
    with pytest.raises(ValueError, match="--data-path: no sample is drawn from valid, test, and Megatron"):
        check_data(arguments(data_path=blend, split="1,1,1", eval_iters=0))


def test_every_data_set_of_a_blend_by_size_needs_a_sample(dataset):
    check_data(arguments(data_path=[str(dataset)] * 2, seq_length=4))
    check_data(arguments(data_path=["1", str(dataset), "1", str(dataset)], seq_length=5))
    with pytest.raises(ValueError, match="with 5 tokens to train, which needs at least 6"):
        check_data(arguments(data_path=[str(dataset)] * 2, seq_length=5))


def test_splits_of_their_own_are_checked_too(dataset):
    flags = dict(train_data_path=[str(dataset)], eval_iters=2)
    check_data(arguments(**flags, valid_data_path=[str(dataset)]))  # Megatron skips the test where it has no data
    with pytest.raises(ValueError, match="no flag gives data to valid, and --eval-iters .2. needs it"):
        check_data(arguments(**flags))
    with pytest.raises(ValueError, match="no flag gives data to train"):
        check_data(arguments(valid_data_path=[str(dataset)], eval_iters=2))


# Token ids: those of the data set are 0, 1, 2.


@pytest.mark.parametrize("vocab_size, is_refused", [(2, True), (3, False), (0, False)], ids=str)
def test_a_token_id_beyond_the_vocabulary_is_refused(dataset, vocab_size, is_refused):
    args = arguments(data_path=[str(dataset)], padded_vocab_size=vocab_size, vocab_size=None)
    if not is_refused:
        check_data(args)
        return
    with pytest.raises(
        ValueError, match="text.bin' holds the token id 2, and the model's vocabulary has the ids 0 to 1"
    ):
        check_data(args)


@pytest.mark.parametrize("token, is_refused", [(-2, True), (-1, False), (7, False), (8, True)], ids=str)
def test_the_ids_of_signed_tokens_begin_with_that_of_padding(tmp_path, token, is_refused):
    prefix = write_indexed(tmp_path / "text", [[0, 1, token, 2, 3]], numpy.int32)
    if is_refused:
        with pytest.raises(ValueError, match=f"holds the token id {token}, "):
            check_data(arguments(data_path=[prefix]))
    else:
        check_data(arguments(data_path=[prefix]))


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_blocks_from_begin_to_end_of_a_large_file_are_searched(tmp_path, monkeypatch, place):
    monkeypatch.setattr(indexed_dataset, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(preflight, "SCANNED_BLOCKS", 3)
    tokens = numpy.zeros(10_000, dtype=numpy.uint16)
    tokens[{"first": 0, "middle": 5_000, "last": -1}[place]] = 9
    prefix = write_indexed(tmp_path / "text", [tokens])
    with pytest.raises(ValueError, match="holds the token id 9, "):
        check_data(arguments(data_path=[prefix]))


def test_tokens_of_a_type_that_cannot_exceed_the_vocabulary_are_not_read(dataset, monkeypatch):
    monkeypatch.setattr(indexed_dataset, "_BLOCK_BYTES", None)  # reading would fail
    check_data(arguments(data_path=[str(dataset)], padded_vocab_size=2**16))
    with pytest.raises(TypeError):
        check_data(arguments(data_path=[str(dataset)], padded_vocab_size=2**16 - 1))


def test_a_full_validation_excludes_test_data(dataset):
    flags = dict(data_path=[str(dataset)], full_validation=True, seq_length=1)
    check_data(arguments(split="2,1,0", **flags))
    for given in (flags | {"split": "1,1,1"}, {"mock_data": True, "full_validation": True}):
        with pytest.raises(ValueError, match="--full-validation excludes test data"):
            check_data(arguments(**given))
