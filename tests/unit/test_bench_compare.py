"""A benchmark on two commits: the table by hand, and one run on two trees."""

import contextlib

import pandas
import pytest

from benchmarks import compare
from tests.processes import run


def rows(*milliseconds):
    return pandas.DataFrame({"case": ["a", "b"], "experts": [4, 8], "total_ms": milliseconds})


def test_the_ratio_is_taken_round_by_round():
    table = compare.summarize([rows(10.0, 1.0), rows(20.0, 1.0)], [rows(5.0, 2.0), rows(12.0, 3.0)])
    assert table.to_dict("records") == [
        {"case": "a", "experts": 4, "base ms": 15.0, "this ms": 8.5, "ratio": 0.55, "min": 0.5, "max": 0.6},
        {"case": "b", "experts": 8, "base ms": 1.0, "this ms": 2.5, "ratio": 2.5, "min": 2.0, "max": 3.0},
    ]


def test_a_case_of_one_tree_alone_has_no_ratio():
    table = compare.summarize([rows(10.0, 1.0)], [rows(5.0, 2.0).iloc[:1]]).set_index("case")
    assert table.ratio["a"] == 0.5 and pandas.isna(table.ratio["b"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["HEAD", "--bench", "recall"], "argument --bench: invalid choice: 'recall'"),
        (["no-such-commit"], "'no-such-commit' must be a commit of this repository"),
        (["HEAD", "--rounds", "0"], "argument --rounds: '0' must be a whole number of at least 1"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_work(words, message, monkeypatch, capsys):
    monkeypatch.setattr(compare, "checkout", None)
    with pytest.raises(SystemExit) as stopped:
        compare.main(words)
    assert stopped.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_rows_that_cannot_be_told_apart_are_refused():
    compare.check_rows(rows(1.0, 2.0), "layer")
    with pytest.raises(ValueError, match="must differ in case and experts, but 'a' with E = 4 occurs twice"):
        compare.check_rows(rows(1.0, 2.0).assign(case="a", experts=4), "layer")


def test_the_benchmarks_end_the_command_as_they_end_themselves(monkeypatch, capsys):
    monkeypatch.setattr(compare, "checkout", lambda commit: contextlib.nullcontext(compare.ROOT))
    with pytest.raises(SystemExit) as stopped:
        compare.main(["HEAD", "--bench", "growth", "--repetitions", "0"])
    assert stopped.value.code == 2 and "Traceback" not in capsys.readouterr().err
    monkeypatch.setattr(compare, "time_tree", lambda *_: compare.check_rows(rows(1.0, 2.0).iloc[[0, 0]], "growth"))
    with pytest.raises(SystemExit) as stopped:
        compare.main(["HEAD", "--bench", "growth"])
    assert stopped.value.code == 2 and "growth: rows must differ" in capsys.readouterr().err.splitlines()[-1]


def worktrees() -> set[str]:
    """The folders of all worktrees; their commits may change meanwhile."""
    listed = run(["git", "worktree", "list", "--porcelain"], cwd=compare.ROOT, check=True).stdout
    return {line for line in listed.splitlines() if line.startswith("worktree ")}


@pytest.mark.long
def test_two_trees_are_timed_in_turn_and_the_other_one_is_removed(capsys):
    before = worktrees()
    sizes = "--experts 256 --hidden 16 --tokens 64 --topk 8 --repetitions 1 --warmup 0".split()
    table = compare.main(["HEAD", "--bench", "growth", "--rounds", "1", *sizes])
    assert list(table["case"]) == ["AIRRouter.route, E = 256"]
    assert table["base ms"][0] > 0 and table.ratio[0] == table["this ms"][0] / table["base ms"][0]
    assert "ratio: time of this tree over that of HEAD" in capsys.readouterr().out
    assert worktrees() == before
