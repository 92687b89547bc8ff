"""The times in the README and on the H100's page are those of the rows that `make bench` and `make gpu` wrote."""

import json
import re
from pathlib import Path

import pandas
import pytest

from benchmarks.targets import read
from tests.documents import README, ROOT, anchor_of, cells, section, sections
from tests.processes import run

RESULTS = ROOT / "docs/results"
NUMBER = re.compile(r"(?<![\d.,])\d[\d,]*(?:\.\d+)?(?![\d.,]*\d)")
SIZE = re.compile(r"\b([EHTKFLM]) = ([\d,]+)")
COLUMN_OF = {"E": "experts", "H": "hidden", "T": "tokens", "K": "topk", "F": "ffn", "L": "shortlist", "M": "candidates"}
AIR, LAYER, GPT = "AIRRouter.route", "AIRMoELayer", "GPT, AIRMoELayer"
MILLION = f"{AIR}, E = 1048576"

# A part of the row's first cell, a part of the column's head, file under docs/results, case, and column of the file.
# A cell with several figures has an entry for each, in their order.
TIMES = [
    ("routing step against", "CPU", "router.csv", AIR, "times_faster"),
    ("routing step against", "H100", "gpu/router.csv", AIR, "times_faster"),
    ("1,048,576 experts", "CPU", "growth.csv", MILLION, "times_slower"),
    ("1,048,576 experts", "H100", "gpu/growth.csv", MILLION, "times_slower"),
    ("a PEER layer", "CPU", "layer.csv", "PEERLayer", "times_ours"),
    ("a PEER layer", "H100", "gpu/layer.csv", "PEERLayer", "times_ours"),
    ("hierarchical routing", "CPU", "layer.csv", "HierarchicalMoELayer", "times_ours"),
    ("hierarchical routing", "H100", "gpu/layer.csv", "HierarchicalMoELayer", "times_ours"),
    ("`MoELayer` around", "H100", "gpu/layer.csv", "MoELayer", "times_ours"),
    ("training step", "CPU", "train.csv", GPT, "times_faster"),
    ("training step", "H100", "gpu/train.csv", GPT, "times_faster"),
]
OF_THE_H100 = {
    "Router": [
        *(
            (row, f"E = {experts}", f"gpu/{file}.csv", case, column)
            for experts, file in (("65,536, K = 64", "router"), ("16,384, K = 32", "router_medium"))
            for row, case, *columns in (
                ("`TopKRouter.forward`", "TopKRouter.forward", "total_ms"),
                ("`AIRRouter.route`", AIR, "total_ms", "times_faster"),
                ("one probe", f"{AIR}, one probe", "total_ms"),
                ("whitened tokens", f"{AIR}, whitened tokens", "total_ms"),
                ("`AIRRouter.forward`", "AIRRouter.forward", "total_ms"),
                ("product keys", "ProductKeyRouter", "total_ms"),
                ("rebuild of the lists", "shortlist rebuild", "total_ms"),
            )
            for column in columns
        ),
        ("forward and backward", "E = 65,536", "gpu/growth.csv", f"{AIR}, E = 65536", "total_ms"),
        ("forward and backward", "E = 1,048,576", "gpu/growth.csv", MILLION, "total_ms"),
        ("forward and backward", "times slower", "gpu/growth.csv", MILLION, "times_slower"),
        ("two layers", "with AIR", "gpu/train.csv", GPT, "total_ms"),
        ("two layers", "with `TopKRouter`", "gpu/train.csv", "GPT, MoELayer with TopKRouter", "total_ms"),
        ("two layers", "times faster", "gpu/train.csv", GPT, "times_faster"),
    ],
    "Whole layers": [
        *(
            (row, head, "gpu/layer.csv", case, column)
            for row, case in (
                ("`AIRMoELayer`", LAYER),
                ("hierarchical routing", "HierarchicalMoELayer"),
                ("PEER", "PEERLayer"),
                ("Megatron's `MoELayer`", "MoELayer"),
            )
            for head, *columns in (
                ("forward and backward", "total_ms", "total_min_ms", "total_max_ms"),
                *([("over ours", "times_ours")] if case != LAYER else []),
                ("memory", "peak_mib"),
            )
            for column in columns
        ),
        ("Megatron's `MoELayer`", "forward and backward", "gpu/layer.csv", f"{LAYER}, beside MoELayer", "total_ms"),
        ("`AIRMoELayer`", "memory", "gpu/layer.csv", LAYER, "peak_with_rebuild_mib"),
    ],
}


def row_of(file: str, case: str) -> dict[str, str]:
    (row,) = (row for row in read(RESULTS, file) if row["case"] == case)
    return row


def as_shown(value: str, figure: str) -> str:
    """A value of a row with the decimals, and the commas between thousands, of a figure in the text."""
    shown = f"{float(value):,.{len(figure.partition('.')[2])}f}"
    return shown if "," in figure else shown.replace(",", "")


def check_cells(text: str, sources: list[tuple]) -> None:
    """The cells with a figure are those that have sources, and each figure is that of its row."""
    unused = set(sources)
    for first, head, cell in cells(text):
        of_cell = [source for source in sources if source[0] in first and source[1] in head]
        unused -= set(of_cell)
        figures = NUMBER.findall(re.sub(r"\]\([^)]*\)", "]", cell))
        expected = [
            as_shown(row_of(file, case)[column], figure)
            for figure, (*_, file, case, column) in zip(figures, of_cell, strict=True)
        ]
        assert figures == expected, f"{first} | {head} | {cell}"
    assert not unused


def test_the_times_of_the_readme_are_those_of_their_rows():
    assert len(TIMES) == 11
    check_cells(section(README, "Time"), TIMES)


def test_the_times_of_the_readme_stand_in_the_sections_that_it_links_to():
    links = [
        (head, *re.fullmatch(r"\[(.*)\]\((docs/results/[^)#]+)#([^)]+)\)", cell).groups())
        for _, head, cell in cells(section(README, "Time"))
        if cell != "not measured"
    ]
    assert len(links) == len(TIMES)
    for head, cell, file, anchor in links:
        assert file == {"CPU": "docs/results/README.md", "H100": "docs/results/h100.md"}[head]
        (text,) = (text for heading, text in sections(ROOT / file).items() if anchor_of(heading) == anchor)
        (figure,) = NUMBER.findall(cell)
        found = {as_shown(number.replace(",", ""), figure) for number in NUMBER.findall(text)}
        assert figure in found, f"{figure} is not in {file}#{anchor}"


@pytest.mark.parametrize("heading", OF_THE_H100)
def test_the_times_on_the_page_of_the_h100_are_those_of_their_rows(heading):
    check_cells(section(RESULTS / "h100.md", heading), OF_THE_H100[heading])


@pytest.mark.parametrize("heading", OF_THE_H100)
def test_sizes_and_commits_on_the_page_of_the_h100_are_those_of_their_rows(heading):
    """Sizes are in the first cell of a row, the head of a column, or with the commit in the sentence before a table."""
    text, num_sizes = section(RESULTS / "h100.md", heading), 0
    captions = re.split(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    for first, head, _ in cells(text):
        for file, case, _ in (one[2:] for one in OF_THE_H100[heading] if one[0] in first and one[1] in head):
            (before,) = (one for one in captions if re.search(rf'PARTS="[^"]*\b{Path(file).stem}\b', one))
            row = row_of(file, case)
            assert f", {row['commit']})" in before or f", {row['commit']}:" in before
            for size, value in SIZE.findall(f"{before} | {first} | {head}"):
                assert row[COLUMN_OF[size]] == value.replace(",", ""), f"{size} = {value} of {first} | {head}"
                num_sizes += 1
    assert num_sizes > 0


def test_the_table_of_bounds_is_that_of_its_rows():
    from benchmarks.quality import bounds

    table = bounds.table(pandas.read_csv(RESULTS / "bounds.csv"))
    assert table.count("\n") == 13 and table in (RESULTS / "README.md").read_text()


def test_rows_are_of_commits_of_this_history():
    """But those that the page of explorations names as lost."""
    words = ["git", "-C", str(ROOT), "rev-parse", "--is-shallow-repository"]
    if run(words).stdout.strip() != "false":
        pytest.skip("needs the whole history")
    commits = set()
    for path in RESULTS.rglob("*.csv"):
        commits |= {row["commit"] for row in read(path.parent, path.name)}
    for path in RESULTS.rglob("*.jsonl"):
        commits |= {json.loads(line)["commit"] for line in path.read_text().splitlines()}
    commits = {commit.removesuffix("-dirty") for commit in commits}
    asked = "".join(f"{commit}^{{commit}}\n" for commit in sorted(commits))
    found = run(["git", "-C", str(ROOT), "cat-file", "--batch-check"], input=asked).stdout.splitlines()
    missing = {line.split("^")[0] for line in found if line.endswith("missing")}
    assert len(found) == len(commits) > 40
    assert (
        missing == {"9855d2a", "a85a0d9"} and "9855d2a and a85a0d9" in (RESULTS / "quality/exploration.md").read_text()
    )
