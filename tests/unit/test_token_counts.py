"""The counts of token ids that tables of hash routers are balanced by: from training data, or from a file."""

import argparse

import numpy
import pytest

from air_moe_megatron.training import token_counts
from air_moe_megatron.training.token_counts import count_token_ids, counts_of
from tests.datasets import write_indexed

IDS = 10
NONE = dict.fromkeys(
    (
        *("data_path", "data_args_path", "train_data_path", "valid_data_path", "test_data_path"),
        *("per_split_data_args_path", "moe_hash_counts", "load", "pretrained_checkpoint"),
    )
)


def arguments(**given):
    fixed = dict(
        split="8,1,1", mock_data=False, sft=False, moe_hash_vocab_size=IDS, moe_router_type="hash",
        moe_num_hash_layers=0, moe_hash_balance="frequency", moe_use_upcycling=False, ckpt_format="torch_dist",
    )  # fmt: skip
    return argparse.Namespace(**NONE | fixed | given)


@pytest.fixture
def make_data(tmp_path):
    """A function that writes a data set: its documents -> its prefix."""
    return lambda name, documents: write_indexed(tmp_path / name, documents)


def test_the_share_of_the_training_is_counted(make_data):
    prefix = make_data("one", [[1, 2], [2, 2, 3], [9], [9, 9]])
    assert count_token_ids(arguments(data_path=[prefix], split="2,1,1")).tolist() == [0, 1, 3, 1, *[0] * 6]
    counts = count_token_ids(arguments(train_data_path=[prefix], split=None))
    assert counts.tolist() == [0, 1, 3, 1, 0, 0, 0, 0, 0, 3]


def test_no_more_than_the_first_tokens_are_counted(make_data, monkeypatch):
    monkeypatch.setattr(token_counts, "COUNTED_TOKENS", 4)
    prefix = make_data("one", [[1, 2], [2, 2, 3], [9]])
    assert count_token_ids(arguments(train_data_path=[prefix])).tolist() == [0, 1, 3, *[0] * 7]


@pytest.mark.parametrize("weights", (None, (1.0, 3.0)), ids=("by-size", "by-weight"))
def test_data_sets_have_the_part_that_they_are_blended_with(make_data, weights):
    sets = {"one": [[1, 1, 1, 2, 2, 2, 2, 4]], "two": [[1, 5], [5, 5]]}
    prefixes = [make_data(name, documents) for name, documents in sets.items()]
    given = prefixes if weights is None else [word for pair in zip(weights, prefixes, strict=True) for word in pair]
    # Megatron takes an even number of words for pairs, unless one of them is no number.
    counts = count_token_ids(arguments(train_data_path=[str(word) for word in given]))
    shares = numpy.array([8, 4] if weights is None else weights) / (12 if weights is None else 4)
    expected = numpy.zeros(IDS)
    for share, documents in zip(shares, sets.values(), strict=True):
        ids = [token for document in documents for token in document]
        for token in ids:
            expected[token] += share / len(ids) * 12
    assert counts.tolist() == pytest.approx(expected.tolist())


def test_a_file_is_taken_as_it_is(tmp_path):
    file = tmp_path / "counts"
    file.write_text("3\n0\n1.5\n")
    assert count_token_ids(arguments(moe_hash_counts=str(file))).tolist() == [3.0, 0.0, 1.5]


def test_counts_are_made_only_where_a_table_needs_them(tmp_path):
    file = tmp_path / "counts"
    file.write_text("1\n")
    given = dict(moe_hash_counts=str(file))
    assert counts_of(arguments(**given)) == counts_of(arguments(moe_router_type="air", moe_num_hash_layers=1, **given))
    assert counts_of(arguments(moe_hash_balance="ids")) is None
    assert counts_of(arguments(moe_router_type="air")) is None


FILES = {
    "words": ("1\nmany\n", "must hold one number per line"),
    "empty": ("", "has 0 counts; it must have 1 to 10"),
    "long": ("1\n" * 11, "has 11 counts; it must have 1 to 10"),
    "negative": ("1\n-1\n", "negative or not finite"),
    "infinite": ("1\ninf\n", "negative or not finite"),
}


@pytest.mark.parametrize("text, words", FILES.values(), ids=FILES)
def test_a_file_that_holds_no_counts_is_named(tmp_path, text, words):
    file = tmp_path / "counts"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        count_token_ids(arguments(moe_hash_counts=str(file)))
    assert f"--moe-hash-counts '{file}'" in str(error.value) and words in str(error.value)


def test_what_cannot_be_counted_is_named(make_data, tmp_path):
    cases = {
        "cannot be read": dict(moe_hash_counts=str(tmp_path / "missing")),
        "cannot count the tokens of --mock-data": dict(mock_data=True),
        "cannot count the tokens of --sft": dict(sft=True),
        "finds no training data": dict(data_path=["x"], split="0,1,0"),
        "in object storage": dict(train_data_path=["msc://bucket/x"]),
        r"holds the token id 9, and --moe-hash-vocab-size (9)": dict(
            train_data_path=[make_data("one", [[9]])], moe_hash_vocab_size=9
        ),
    }
    for words, given in cases.items():
        with pytest.raises(ValueError) as error:
            count_token_ids(arguments(**given))
        assert words in str(error.value)
