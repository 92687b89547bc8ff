"""What `python -m air_moe_megatron.convert` refuses before anything is built, and what it says that it did."""

import argparse
from pathlib import Path

import pytest

from air_moe_megatron.command.checkpoints.reader import Checkpoint, Location
from air_moe_megatron.inference import conversion

SAVED = dict(
    moe_router_type="air", moe_router_input_norm="none", moe_granular_experts=True, num_experts=16,
    ckpt_format="torch_dist",
)  # fmt: skip
GIVEN = dict(load="old", save="new", moe_router_type="topk", async_save=False)
ARGS = dict(moe_router_type="air", moe_air_codebook_source="tokens", data_path=["x"], fit_tokens=None)
REFUSED = {
    # name: (of the checkpoint, given, message)
    "no-target": ({}, {"save": None}, "--save must name the folder of the new checkpoint"),
    "no-experts": ({"num_experts": None}, {}, "holds a model without experts"),
    "from-another-type": ({"moe_router_type": "vq"}, {}, "holds routers of type vq, which cannot become topk"),
    "to-another-type": ({}, {"moe_router_type": "hash"}, "holds routers of type air, which cannot become hash"),
    "another-type-kept": ({"moe_router_type": "hierarchical"}, {"moe_router_type": None}, "hierarchical, which cannot"),
    "another-format": ({"ckpt_format": "torch"}, {}, "is in the format torch: only torch_dist is converted"),
    "norm-of-megatrons-router": (
        {"moe_router_input_norm": "running", "moe_granular_experts": False}, {},
        "trained with --moe-router-input-norm running and Megatron's own experts, so it cannot become topk",
    ),
    "asynchronous": ({}, {"async_save": True}, "--async-save is not supported"),
}  # fmt: skip


def namespace(*parts):
    return argparse.Namespace(**{name: value for part in parts for name, value in part.items()})


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_refused(name):
    saved, given, message = REFUSED[name]
    conversion.check_convertible(namespace(SAVED), namespace(GIVEN))
    with pytest.raises(ValueError) as error:
        conversion.check_convertible(namespace(SAVED, saved), namespace(GIVEN, given))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("saved", "args", "message"),
    [
        ("topk", {"data_path": None}, "--data-path must name the data"),
        ("topk", {"fit_tokens": 0}, r"--fit-tokens \(0\) must be at least 1"),
        ("topk", {"moe_air_codebook_source": "experts"}, r"--data-path \(\['x'\]\) has no effect"),
        ("air", {"data_path": None, "fit_tokens": 8}, r"--fit-tokens \(8\) has no effect"),
    ],
)
def test_data_are_given_where_a_codebook_is_fitted_and_nowhere_else(saved, args, message):
    conversion.check_data_flags(namespace(ARGS), namespace(SAVED, {"moe_router_type": "topk"}))
    with pytest.raises(ValueError, match=message):
        conversion.check_data_flags(namespace(ARGS, args), namespace(SAVED, {"moe_router_type": saved}))


@pytest.mark.parametrize("name", ["latest_checkpointed_iteration.txt", "iter_0000003", "release", ".metadata"])
def test_a_folder_with_a_checkpoint_or_a_part_of_one_is_no_target(tmp_path, name):
    (tmp_path / "log.txt").touch()
    conversion.check_save_folder(str(tmp_path))
    conversion.check_save_folder(str(tmp_path / "none"))
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"holds {name}, of a checkpoint: name a new or empty folder"):
        conversion.check_save_folder(str(tmp_path))


def checkpoint(*names, index=(4, 8)):
    shapes = {f"layers.router.{name}": (16, 32) for name in names}
    if "codebook.ema" in names:
        shapes["layers.router.index.shortlist"] = index
    shapes |= {"layers.experts.weight1": (16, 8), "embedding.weight": (64, 32)}
    return Checkpoint(Location("--load", Path("x"), "iter_0000003"), False, shapes, (), None)


@pytest.mark.parametrize(
    ("source", "target", "has_new_lists", "line"),
    [
        (["weight"], ["weight", "codebook.ema"], True, "weight kept; codebook, index made anew"),
        (["weight", "codebook.ema"], ["weight"], False, "weight kept; codebook, index dropped"),
        (["weight", "codebook.ema"], ["weight", "codebook.ema"], True, "codebook, weight kept; index made anew"),
        (["weight", "codebook.ema"], ["weight", "codebook.ema"], False, "codebook, index, weight kept"),
    ],
)
def test_one_line_for_each_kind_of_layer(source, target, has_new_lists, line):
    said = conversion.describe(checkpoint(*source), checkpoint(*target), has_new_lists).splitlines()
    assert said[:3] == [f"  routers: {line}", "  experts: 1 tensors kept", "  all other layers: 1 tensors kept"]
    assert "optimizer, learning-rate schedule and random states: not saved; all start anew" in said[3]
    assert "--no-load-optim" in said[4] and "--finetune" in said[4]
