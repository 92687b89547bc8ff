"""Each rule of a report fires on what it is about, alone, and on nothing else."""

import argparse
import re
from pathlib import Path

import pandas
import pytest

from air_moe_megatron.config import AIRFields
from air_moe_megatron.report.rules import FIRST_BY_HASH, RECORDS, RULES, Finding, findings, layer_metrics, ranges
from air_moe_megatron.report.runs import read_run
from tests.run_files import diagnostics, header, lines, step, write

ROUTERS = AIRFields.__annotations__["moe_router_type"].__args__
# Rule -> figures of all layers that break it.
OF_LAYERS = {
    "experts unused": {"experts_used": 0.7},
    "experts unlisted": {"experts_listed": 0.98},
    "top-k recall": {"topk_recall": 0.67},
    "list drift": {"list_overlap": 0.4},
    "idle codewords": {"idle_codewords": 300},
    "entropy of the codewords": {"codeword_entropy": 0.5},
    "quantization error below 0.02": {"quantization_error": 0.01},
    "quantization error above 0.6": {"quantization_error": 0.7},
    "imbalance of experts": {"imbalance_factor": 11.0},
    "imbalance of ranks": {"rank_imbalance": 1.3},
    "broken bound": {"mass_bound": 0.5, "mass_recall": 0.3},
}
HEALTHY = {"topk_recall": 0.75, "experts_used": 0.9, "experts_listed": 1.0, "list_overlap": 0.8}


def key(rule):
    return f"{rule.name} {rule.threshold}" if rule.name == "quantization error" else rule.name


def found(folder, records):
    return {key(finding.rule): finding for finding in findings(read_run(write(folder, records), "run"))}


def records_of(*figures, interval=20):
    """A run with a record for each of the given figures, which all layers have."""
    numbers = range(1, len(figures) + 1)
    records = [
        (step(interval * n), diagnostics(interval * n, 10**6, **HEALTHY | of))
        for n, of in zip(numbers, figures, strict=True)
    ]
    return [header(), *(line for pair in records for line in pair)]


def test_a_healthy_run_breaks_no_rule(tmp_path):
    assert not found(tmp_path, records_of(*[{}] * 6))


def test_codewords_are_idle_as_far_as_a_step_reaches_them(tmp_path):
    """With a schedule of batches, tokens of a step are those between records."""
    few = {"global_batch_size": 1, "seq_length": 100}  # 512 codewords: 100 tokens reach a sixth of them
    for arguments, is_idle in ((few, False), ({**few, "step_batch_size_schedule": "0:100"}, True)):
        lines = records_of(*[{"idle_codewords": 400}] * 6)
        lines[0]["arguments"] |= arguments
        assert ("idle codewords" in found(tmp_path / str(is_idle), lines)) == is_idle


@pytest.mark.parametrize("name", OF_LAYERS)
def test_a_rule_of_layers_fires_alone(tmp_path, name):
    (finding,) = found(tmp_path, records_of({}, {}, *[OF_LAYERS[name]] * 4)).values()
    assert key(finding.rule) == name
    assert (list(finding.layers), finding.since) == ([1, 2], 60)
    assert finding.text.startswith("layers 1 to 2 (worst: ") and ", since step 60: " in finding.text


@pytest.mark.parametrize("name", OF_LAYERS)
def test_a_rule_is_silent_when_it_held_too_shortly_or_holds_no_more(tmp_path, name):
    broken = OF_LAYERS[name]
    assert not found(tmp_path / "short", records_of({}, {}, {}, *[broken] * (RECORDS - 1)))
    assert not found(tmp_path / "over", records_of(*[broken] * 5, {}))


def test_recall_that_falls_is_a_warning_before_it_is_low(tmp_path):
    high, low = {"topk_recall": 0.95}, {"topk_recall": 0.8}
    (finding,) = found(tmp_path / "fell", records_of(high, high, low, low, low)).values()
    assert finding.rule.name == "recall lost" and "15% below its best" in finding.text
    assert not found(tmp_path / "rose", records_of(low, low, high, high, high))


def test_one_sick_layer_is_named_alone(tmp_path):
    records = records_of(*[{}] * 4)
    for record in records[2::2]:
        record["layers"][1]["experts_used"] = 0.69
    (finding,) = found(tmp_path, records).values()
    assert finding.text == (
        "layer 2: 31% of the experts unused, since step 20: raise --moe-air-num-explored, or raise --moe-aux-loss-coeff"
    )


def test_experts_that_no_token_could_reach_are_not_missed(tmp_path):
    records = records_of(*[{"experts_used": 0.6}] * 4, interval=1)
    for layer in records[0]["layers"]:
        layer["num_experts"] = 16 * 16384  # half a slot for each expert between two records
    run = read_run(write(tmp_path, records), "run")
    assert not [finding for finding in findings(run) if finding.rule.name == "experts unused"]
    assert (layer_metrics(run)["unused"].dropna()[1:] < 0.25).any()


@pytest.mark.parametrize(
    ("name", "share", "losses"),
    [
        ("share of routing", 0.6, [3.0, 2.0, 2.0, 2.0, 2.0]),
        ("loss", 0.1, [3.0, 2.0, 2.6, 2.7, 2.8]),
        ("missing loss", 0.1, [3.0, 2.0, None, None, None]),
    ],
)
def test_a_rule_of_the_run_fires_alone(tmp_path, name, share, losses):
    records = records_of(*[{}] * 5)
    for line, loss in zip(records[1::2], losses, strict=True):
        line["loss"] = loss
    for line in records[2::2]:
        line["routing_share"] = share
    (finding,) = found(tmp_path, records).values()
    assert finding.rule.name == name and list(finding.layers) == [0]
    for line in records[-2:]:
        line |= {"loss": 2.0} if line["kind"] == "step" else {"routing_share": 0.1}
    assert not found(tmp_path / "over", records)


def test_every_rule_is_tested():
    of_run = {"share of routing", "loss", "missing loss", "recall lost"}
    assert {key(rule) for rule in RULES} == set(OF_LAYERS) | of_run
    assert all((rule.above is None) != (rule.below is None) and rule.reason for rule in RULES)


@pytest.mark.parametrize("rule", RULES, ids=key)
def test_remedies_name_flags_that_exist(rule, megatron_cpu):
    from megatron.training.arguments import add_megatron_arguments

    from air_moe_megatron.command.arguments import extra_args_provider

    parser = extra_args_provider(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    known = {flag for action in parser._actions for flag in action.option_strings}
    assert set(rule.remedies) - {""} <= {*ROUTERS, FIRST_BY_HASH}
    for router in (*ROUTERS, FIRST_BY_HASH):
        flags = re.findall(r"--[a-z0-9-]+", rule.remedy(router))
        assert set(flags) <= known
        assert flags or rule.name == "broken bound"
        assert re.match(r"(raise|lower|set|choose|change) ", rule.remedy(router)) or rule.name == "broken bound"


@pytest.mark.parametrize("router", ROUTERS)
def test_a_finding_has_the_remedy_of_its_router(tmp_path, router):
    (finding,) = findings(read_run(write(tmp_path, lines(router, end=400, imbalance_factor=20.0)), "run"))
    assert finding.text.endswith(finding.rule.remedy(router))
    assert ("choose another --moe-router-type" in finding.text) == (router == "hash")


def test_first_layers_by_hash_do_not_make_a_run_one_by_hash(tmp_path):
    records = lines("air", end=400, num_hash_layers=1, imbalance_factor=20.0, rank_imbalance=2.0, experts_used=0.1)
    for line in records:
        if line["kind"] == "diagnostics":
            line["routing_share"] = 0.6
    texts = [(finding.rule.name, finding.text) for finding in findings(read_run(write(tmp_path, records), "run"))]

    def of(name, where):
        (text,) = (text for rule, text in texts if rule == name and text.startswith(where))
        return text

    assert of("share of routing", "routing takes 60%").endswith(
        ": lower --moe-air-num-probes, then --moe-air-num-clusters"
    )
    of_hash = of("imbalance of experts", "layer 1: ")
    assert of_hash.endswith(": set --moe-hash-balance frequency; where it is set, lower --moe-num-hash-layers")
    assert of("imbalance of experts", "layer 2: ").endswith(": raise --moe-aux-loss-coeff")
    assert of("imbalance of ranks", "layer 1: ").endswith(": change --moe-hash-seed")
    assert ": lower --moe-num-hash-layers: " in of("experts unused", "layer 1: ")
    assert not any("--moe-router-type" in text for _, text in texts)


def test_layers_are_worded_as_ranges():
    assert ranges([1, 2, 3, 7]) == "1 to 3, 7"
    assert ranges([4]) == "4"


def test_a_finding_has_the_newest_value_and_the_first_step_of_the_last_stretch(tmp_path):
    records = records_of({"topk_recall": 0.1}, {}, *[{"topk_recall": value} for value in (0.69, 0.66, 0.68)])
    (finding,) = found(tmp_path, records).values()
    assert isinstance(finding, Finding) and finding.layers == {1: (0.68, 60), 2: (0.68, 60)}
    assert finding.rule.worst(pandas.Series([0.5, 0.6])) == 0.5


def test_the_thresholds_of_the_documentation_are_those_of_the_rules():
    """All but those that need no number: a bound above the measured recall, and a loss that is no number."""
    page = (Path(__file__).resolve().parents[2] / "docs/health.md").read_text()
    documented = re.findall(r"^\| [^|]+ \| (above|below) ([\d.]+%?) \| [^|]+ \|$", page, re.MULTILINE)
    numbers = [(way, float(number.rstrip("%")) / (100 if number.endswith("%") else 1)) for way, number in documented]
    rules = [rule for rule in RULES if rule.name not in ("broken bound", "missing loss")]
    expected = [("below", rule.below) if rule.above is None else ("above", rule.above) for rule in rules]
    assert sorted(numbers) == sorted(expected)
    assert f"in each of the last {'three' if RECORDS == 3 else RECORDS} records" in page
