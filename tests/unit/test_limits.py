"""docs/limits.md is what the tables of refusals say, and every row of the tables can be reached."""

import runpy
from pathlib import Path

import pytest

from air_moe_megatron.command.entry_refusals import FLAG_REFUSALS
from air_moe_megatron.config import CAUSES, REFUSALS, AIRMoEConfig

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_generated_from_the_tables():
    page = runpy.run_path(str(DOCS / "make_limits.py"))["page"]()
    assert (DOCS / "limits.md").read_text(encoding="utf-8") == page, "run `make limits`"


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: f"{row.cause.title}-{row.field}")
def test_rows_name_fields_of_the_config(row):
    assert row.field in AIRMoEConfig.__dataclass_fields__ and row.reason


def test_every_cause_has_rows_and_a_place_on_the_page():
    assert set(CAUSES) == {row.cause for row in REFUSALS} and len(set(CAUSES)) == len(CAUSES)


def test_flags_are_megatrons(monkeypatch):
    from megatron.training.arguments import parse_args

    from air_moe_megatron.command.arguments import extra_args_provider

    monkeypatch.setattr("sys.argv", ["pretrain"])
    args = vars(parse_args(extra_args_provider))
    assert {row.flag.removeprefix("--").replace("-", "_") for row in FLAG_REFUSALS} <= args.keys()
