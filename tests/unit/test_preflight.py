"""check_data names the flag, the path and the rule for every data set that cannot be read."""

import argparse
import json
import struct
from pathlib import Path

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from air_moe_megatron.preflight import check_data

HEADER_SIZE = 34
DATA_FLAGS = (
    "data_path",
    "data_args_path",
    "train_data_path",
    "valid_data_path",
    "test_data_path",
    "per_split_data_args_path",
)


def arguments(**given):
    return argparse.Namespace(**dict.fromkeys(DATA_FLAGS) | {"mock_data": False, "sft": False} | given)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A data set of two documents, 5 tokens of 2 bytes each."""
    prefix = tmp_path / "text"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for lengths in ([2], [1, 2]):
        builder.add_document(numpy.arange(sum(lengths)), lengths)
    builder.finalize(f"{prefix}.idx")
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


def test_no_data_names_the_flags():
    with pytest.raises(ValueError, match="no data set is given: add --data-path .*--train-data-path .*--mock-data"):
        check_data(arguments())


@pytest.mark.parametrize("flag", ["data_path", "train_data_path", "valid_data_path", "test_data_path"])
def test_missing_index(flag, dataset):
    Path(f"{dataset}.idx").unlink()
    name = "--" + flag.replace("_", "-")
    with pytest.raises(ValueError, match=f"^{name} entry '{dataset}': '{dataset}.idx' does not exist; .*x.bin, x.idx"):
        check_data(arguments(**{flag: [str(dataset)]}))


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
        check_data(arguments(per_split_data_args_path=str(path)))


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
