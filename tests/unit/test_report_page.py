"""The page of a report: all that it should have, for every router type, in one file that needs no other."""

import json
import re
import sys
from collections import Counter
from html.parser import HTMLParser

import numpy
import pytest

from air_moe_megatron.config import AIRFields
from air_moe_megatron.report import __main__ as command
from air_moe_megatron.report import figures
from air_moe_megatron.report.page import MOST_BYTES, render
from air_moe_megatron.report.panels import GLANCE, PANELS, Budget, Builder
from air_moe_megatron.report.rules import RULES
from air_moe_megatron.report.runs import read_runs
from air_moe_megatron.report.tables import cost_rows, router_flops
from air_moe_megatron.report.tokens import texts_of, visible
from tests.processes import run as run_command
from tests.run_files import codebook, diagnostics, header, lines, step, write

ROUTERS = AIRFields.__annotations__["moe_router_type"].__args__
SECTIONS = ["runs", "warnings", "loss", "glance", "layers", "cost", "rules", "settings"]
VOID = {"link", "meta", "br", "img", "input"}


class Page(HTMLParser):
    """What a page has, read as a browser reads it."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.labels, self.open, self.text = Counter(), [], [], ""
        self.ids, self.links, self.sections = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements[tag] += 1
        if tag not in VOID:
            self.open.append(tag)
        self._read(tag, attributes)

    def handle_startendtag(self, tag, attributes):
        self.elements[tag] += 1
        self._read(tag, attributes)

    def _read(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
                self.sections += [value] * (tag == "section")
            elif name == "aria-label":
                self.labels.append(value)
            elif name in ("href", "xlink:href", "src", "srcset", "action", "data", "poster"):
                self.links.append(value)
            elif not name.startswith("xmlns"):
                assert "//" not in (value or ""), f"{name}={value}"
            self.links += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["style"]:
            assert "@import" not in data and "url(" not in data
        else:
            self.text += f"{data} "


def page_of(*folders):
    text = render(read_runs(folders))
    return Page(text), text


def drawn(folder, records, snapshot):
    """The figures of layer 1."""
    return Builder(read_runs([write(folder, records, snapshot)]), Budget(1, 50, 20, 100)).layers([1])[0]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Router type -> page of a run of one layer."""
    found = {}
    for router in ROUTERS:
        folder = tmp_path_factory.mktemp(router)
        write(folder, lines(router, 1), codebook(num_layers=1, num_clusters=20) if router == "air" else None)
        found[router] = page_of(folder)[0]
    return found


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory):
    """The page of three runs of different routers; exact routing takes four times as long."""
    folder = tmp_path_factory.mktemp("three")
    exact = lines("topk", 1)
    for line in exact:
        if line["kind"] == "diagnostics":
            line["routing_seconds"] *= 4
    records = {"air": lines("air", 1), "topk": exact, "hash": lines("hash", 1)}
    return page_of(*(write(folder / name / "checkpoint", records[name]) for name in records))


@pytest.fixture(scope="module")
def eventful(tmp_path_factory):
    """The page of a run that was resumed, cut, is imbalanced, and whose words look like HTML."""
    folder = tmp_path_factory.mktemp("eventful") / "<b>&amp;"
    records = lines(num_layers=2, end=100, interval=10, imbalance_factor=20.0)
    records[0]["arguments"]["note"] = "</td><script>alert(1)</script>"
    return page_of(write(folder, [*records, header(iteration=50, lr=0.001), step(60), "{"]))


@pytest.mark.parametrize("router", ROUTERS)
def test_the_page_has_every_section(pages, router):
    page = pages[router]
    assert page.sections == SECTIONS
    assert "layer-1" in page.ids
    for rule in RULES:
        assert rule.name in page.text and rule.threshold in page.text and rule.reason in page.text
    assert not page.elements["script"]
    figures_of_all = {"Loss over tokens", "Loss over time", "Router FLOPs", "Share of routing, the run"}
    of_layers = {"Experts used and listed, layer 1", "Load imbalance, layer 1"}
    assert figures_of_all | of_layers <= set(page.labels)
    assert sum("Mean load of ranges of experts" in label for label in page.labels) == 1


def test_air_has_every_figure_and_others_say_what_they_lack(pages):
    labels = pages["air"].labels
    expected = [f"{panel.title}, layer 1" for panel in PANELS]
    expected += [f"{panel.title}, all layers" for panel in GLANCE]
    assert set(expected) <= set(labels) and len(labels) == len(set(labels))
    assert sum("Map of the codebook" in label for label in labels) == 1
    assert "No run here has: Top-k recall; Mass recall and its lower bounds" in " ".join(pages["hash"].text.split())
    assert "only the air router has codebooks" in pages["hash"].text
    assert "only the air router has codebooks" not in pages["air"].text


@pytest.mark.parametrize("router", ROUTERS)
def test_the_page_needs_nothing_from_outside(pages, router):
    page = pages[router]
    assert page.links
    for link in page.links:
        assert link.startswith(("#", "data:")), link
        assert not link.startswith("#") or link[1:] in page.ids, link
    assert len(page.ids) == len(set(page.ids))


def test_codewords_tell_their_tokens_under_the_pointer(tmp_path):
    snapshot = codebook(iteration=20, num_layers=1, num_clusters=3)
    snapshot["layers"][0] |= {"load": [6, 3, 1], "recall": [0.5, None, 1.0]}
    snapshot["layers"][0]["tokens"] = [[[97, 4], [256, 2]], [[10, 3]], []]
    ((figure, rows),) = drawn(tmp_path, lines("air", 1, end=20), snapshot)["maps"]
    assert sorted(re.findall(r"<title>(codeword[^<]*)</title>", figure.svg)) == [
        "codeword 0: 60.00% of the tokens, recall 50%\na (4), end of document (2)",
        "codeword 1: 30.00% of the tokens, recall –\n\\n (3)",
        "codeword 2: 10.00% of the tokens, recall 100%",
    ]
    assert rows[0] == ("0", "60.00%", "50%", "a (4), end of document (2)")


def test_without_token_ids_codewords_tell_load_and_recall(tmp_path):
    snapshot = codebook(iteration=20, num_layers=1, num_clusters=3)
    del snapshot["layers"][0]["tokens"]
    ((figure, _),) = drawn(tmp_path, lines("air", 1, end=20), snapshot)["maps"]
    assert len(re.findall(r"<title>codeword \d: [\d.]+% of the tokens, recall [\d–]+%?</title>", figure.svg)) == 3


def test_runs_stand_side_by_side(three_runs):
    page, text = three_runs
    assert page.sections == SECTIONS
    assert "The runs have different routers" in page.text
    (used,) = re.findall(r'<svg[^>]*aria-label="Experts used, all layers".*?</svg>', text, re.DOTALL)
    styles = dict(re.findall(r"^\.(s\d+) { (.*) }$", text, re.MULTILINE))
    found = [styles.get(name, "") for name in re.findall(r'class="(s\d+)"', used)]
    found += re.findall(r'style="([^"]*)"', used)
    assert all(any(color.lower() in style for style in found) for color in figures.COLORS[:3])
    assert not any(color.lower() in style for style in found for color in figures.COLORS[3:6])


def test_exact_routing_beside_another_gives_the_ratio_of_times(three_runs):
    cells = "air air 0.210 4.194 5.00% 20.0 4.0% 250 0.25"
    assert cells in " ".join(three_runs[0].text.split())


def test_times_are_compared_only_where_the_steps_are_alike(tmp_path):
    def run_of(name, router, seconds, num_layers=2, device="CPU", **arguments):
        record = diagnostics(20, 20, router, num_layers) | {"routing_seconds": seconds}
        first = header(router, num_layers, **arguments) | {"device": device}
        return write(tmp_path / name, [first, step(20), record])

    alike = dict(global_batch_size=32, seq_length=256, world_size=2)
    folders = [
        run_of("air", "air", 0.1, **alike),
        run_of("small-topk", "topk", 0.1, **alike | {"global_batch_size": 8}),
        run_of("topk", "topk", 0.4, **alike),
        run_of("batch", "air", 0.1, **alike | {"global_batch_size": 16}),
        run_of("sequence", "air", 0.1, **alike | {"seq_length": 128}),
        run_of("ranks", "air", 0.1, **alike | {"world_size": 4}),
        run_of("others", "air", 0.1, num_layers=3, device="NVIDIA H100", **alike),
    ]
    ratios = [row["time against exact"] for row in cost_rows(read_runs(folders))]
    assert ratios == ["0.25", "1.00", "1.00", "–", "–", "–", "–"]
    others = dict(num_experts=4096), dict(hidden_size=64), dict(bf16=True), dict(pipeline_model_parallel_size=2)
    folders = [folders[2], *(run_of(f"other-{place}", "air", 0.1, **alike, **one) for place, one in enumerate(others))]
    ratios = [row["time against exact"] for row in cost_rows(read_runs(folders))]
    assert ratios == ["1.00", "–", "–", "–", "–"]


def test_exact_routing_in_place_of_a_hash_layer_has_the_norm_of_the_run(tmp_path, megatron_cpu):
    """Its own config, from which training takes the cost of the exact router for the file, has no norm."""
    from air_moe_megatron.config import hash_layer_config
    from air_moe_megatron.routers import AIRRouter, ExactRouter, HashRouter
    from tests.builders import make_config

    config = make_config(moe_router_type="air", num_layers=2, moe_num_hash_layers=1, moe_router_input_norm="whitening")
    records = lines(num_layers=2, end=20, num_hash_layers=1)
    of_layers = zip(records[0]["layers"], (HashRouter, AIRRouter), (hash_layer_config(config), config), strict=True)
    for layer, router, of_layer in of_layers:
        layer["router_flops_per_token"] = router.flops(of_layer).total
        layer["exact_router_flops_per_token"] = ExactRouter.flops(of_layer).total
    (run,) = read_runs([write(tmp_path, records)])
    assert run.routers == ["hash", "air"]
    assert router_flops(run) == (AIRRouter.flops(config).total, 2 * ExactRouter.flops(config).total)


def test_resumes_and_cut_lines_are_named(eventful):
    text = " ".join(eventful[0].text.split())
    assert "resumed after step 50 (204,800 tokens); 10 lines of the earlier run that lie beyond are left out" in text
    assert "--lr 0.003 → 0.001" in text and "cut short" in text and "Dashed vertical lines" in text


def test_warnings_stand_on_the_page(eventful, pages):
    where = "layers 1 to 2 (worst: 1): the load is as uneven as if one expert in 20 did all the work, since step 10"
    assert where in eventful[0].text
    assert "No rule holds." in pages["air"].text and "No rule holds." not in eventful[0].text


def test_what_a_run_calls_itself_is_text(eventful):
    page, text = eventful
    assert not page.elements["script"] and "<b>&amp;" in page.text and "<script>" not in text


def test_a_run_of_steps_alone_has_a_page(tmp_path):
    page, _ = page_of(write(tmp_path, [{**header(), "layers": []}, step(20)]))
    assert page.sections == SECTIONS and "no diagnostics were recorded" in page.text
    assert "Too few records for warnings: 0 of the 3" in page.text
    head = header()
    due = {**head, "arguments": {**head["arguments"], "moe_air_diagnostics_interval": 100}, "layers": []}
    page, _ = page_of(write(tmp_path / "early", [due, step(20)]))
    assert "no diagnostics were recorded: one is due every 100 steps" in page.text


def test_values_that_are_no_numbers_leave_gaps(tmp_path):
    records = lines(num_layers=1, end=100, quantization_error=float("nan"))
    records[2]["layers"][0]["topk_recall"] = None
    records[2]["layers"][0]["load_bins"][0] = None
    snapshot = codebook(iteration=100, num_layers=1, num_clusters=5)
    snapshot["layers"][0]["x"][2] = None
    layer = drawn(tmp_path, records, snapshot)
    names = {figure.title for figure in layer["panels"] if figure.svg}
    assert {"Top-k recall", "Quantization error and list drift"} <= names and len(layer["loads"]) == 2
    assert layer["maps"][0][0].svg.count("<title>codeword") == 4


@pytest.mark.long
def test_a_long_run_of_a_deep_model_stays_below_the_limit(tmp_path):
    layers = [json.dumps(diagnostics(100 * n, 1000, num_layers=48)["layers"]) for n in range(1, 11)]
    records = [header(num_layers=48)]
    for number in range(1, 1001):
        line = {**diagnostics(10 * number, 1, num_layers=0), "layers": "LAYERS"}
        records += [step(10 * number), json.dumps(line).replace('"LAYERS"', layers[number % 10])]
    (book,) = codebook(num_layers=1, num_clusters=2048)["layers"]
    snapshot = {"iteration": 10000, "layers": [{**book, "layer": number} for number in range(1, 49)]}
    text = render(read_runs([write(tmp_path, records, snapshot)]))
    assert 1_000_000 < len(text.encode()) < MOST_BYTES == 5_000_000
    ids = re.findall(r' id="([^"]*)"', text)
    assert {f"layer-{number}" for number in range(1, 49)} <= set(ids) and len(ids) == len(set(ids))


def test_a_page_that_grows_too_large_leaves_out_layers_but_none_with_a_warning(tmp_path, monkeypatch):
    records = lines("hash", 3, end=60)
    for line in records:
        if line["kind"] == "diagnostics":
            line["layers"][1]["imbalance_factor"] = 30.0
    folder = write(tmp_path, records)
    limit = 60_000
    monkeypatch.setattr("air_moe_megatron.report.page.MOST_BYTES", limit)
    page, text = page_of(folder)
    assert len(text.encode()) < limit and "layer-2" in page.ids and not {"layer-1", "layer-3"} & set(page.ids)
    assert "The page has room for 1 of 3 layers: 2." in page.text


def test_a_page_that_is_too_large_without_layers_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("air_moe_megatron.report.page.MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="the page of 1 runs would exceed"):
        page_of(write(tmp_path, [{**header(), "layers": []}, step(20)]))


# What draws.


def test_thinned_curves_keep_means_and_extremes():
    x, y = numpy.arange(1.0, 5), numpy.array([1.0, 3, 5, 5])
    assert [part.tolist() for part in figures.thinned(x, y, 2)] == [[1.5, 3.5], [2, 5], [1, 5], [3, 5]]
    assert figures.thinned(x, y, 4)[1] is y


def test_loads_are_binned_by_tokens():
    loads = numpy.array([[0.0], [2], [5]])
    assert figures.binned(loads, numpy.array([0.0, 1, 4]), 2).tolist() == [[1], [5]]
    assert figures.binned(loads, numpy.array([0.0, 1, 10]), 3).tolist() == [[1], [1], [5]]
    assert figures.binned(loads[:1], numpy.array([7.0]), 3).tolist() == [[0]]


# Tokens.


def test_bytes_are_shown_as_characters(tmp_path):
    (run,) = read_runs([write(tmp_path, lines(end=20))])
    texts, note = texts_of(run, [97, 32, 10, 0, 200, 256, 97])
    assert texts == {97: "a", 32: "␣", 10: "\\n", 0: "\\x00", 200: "\\xc8", 256: "end of document"}
    assert note is None


def test_ids_stay_ids_where_there_is_no_text(tmp_path):
    records = lines(end=20)
    records[0]["tokenizer"] = {"type": "NullTokenizer", "model": None, "vocab_size": 32000}
    (run,) = read_runs([write(tmp_path, records)])
    texts, note = texts_of(run, [5])
    assert texts == {5: "#5"} and "knows no texts" in note


def test_tokens_are_decoded_by_the_tokenizer_of_the_run(tmp_path, megatron_cpu):
    import sentencepiece

    prefix = str(tmp_path / "words")
    sentences = iter(["the cat sat on the mat"] * 9)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_prefix=prefix, model_type="word", vocab_size=8, minloglevel=2
    )
    records = lines("hash", 1, end=20)
    records[0]["tokenizer"] = {"type": "SentencePieceTokenizer", "model": f"{prefix}.model", "vocab_size": 8}
    (run,) = read_runs([write(tmp_path, records)])
    number = sentencepiece.SentencePieceProcessor(f"{prefix}.model").piece_to_id("▁cat")
    assert texts_of(run, [number]) == ({number: "␣cat"}, None)
    records[0]["tokenizer"]["model"] = f"{prefix}.missing"
    (run,) = read_runs([write(tmp_path, records)])
    texts, note = texts_of(run, [number])
    assert texts == {number: f"#{number}"} and "could not be built here" in note


def test_what_cannot_be_seen_is_made_visible():
    assert visible(" the\n\u200b") == "␣the\\n\\u200b"
    assert visible("") == "(empty)"


# The command.


def test_the_command_writes_the_page_and_says_where(tmp_path, capsys):
    write(tmp_path, [{**header(), "layers": []}, step(20)])
    command.main([str(tmp_path)])
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'report.html'} (0.")
    command.main([str(tmp_path), "--out", str(tmp_path / "new" / "page.html")])
    pages = [tmp_path / "report.html", tmp_path / "new" / "page.html"]
    assert pages[0].read_text() == pages[1].read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["air_diagnostics.jsonl", "new", "report.html"]


def test_a_folder_as_the_page_is_refused(tmp_path, capsys):
    write(tmp_path, lines(end=20))
    with pytest.raises(SystemExit):
        command.main([str(tmp_path), "--out", str(tmp_path)])
    assert "is a folder; give the name of a file in it" in capsys.readouterr().err
    for name in ("air_diagnostics.jsonl", "air_codebook.json"):
        with pytest.raises(SystemExit):
            command.main([str(tmp_path), "--out", str(tmp_path / name)])
        assert "is the name of a run's own file" in capsys.readouterr().err
    assert read_runs([tmp_path])


def test_nothing_heavy_is_loaded_before_the_report_runs_and_a_missing_package_is_named(tmp_path):
    write(tmp_path, lines(end=20))
    code = (
        "import sys\n"
        "from air_moe_megatron.report.__main__ import main\n"
        "heavy = {'pandas', 'matplotlib', 'numpy', 'torch', 'megatron', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.modules['matplotlib'] = None\n"
        f"main([{str(tmp_path)!r}])\n"
    )
    result = run_command([sys.executable, "-c", code])
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "the package matplotlib is missing" in result.stderr and "air_moe_megatron[train]" in result.stderr
