"""Which checkpoint a run loads, whether it is whole, and what it lacks, found before the start."""

import argparse
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import BytesIOWriteData, SavePlan, TensorWriteData, WriteItem, WriteItemType

from air_moe_megatron.routers.missing_state import MissingState
from tests.saved import AIR, ALONE, GRANULAR, NORM, only, tensors_of
from tests.unit.test_agreement import on_ranks

# What loads.


@pytest.mark.parametrize("fields", [{}, AIR, AIR | GRANULAR, GRANULAR | NORM, {"moe_router_type": "hash"}])
def test_the_run_that_saved_it_passes(save, check, is_legacy, fields):
    if fields.get("moe_router_type") == "hash":
        fields = fields | {"moe_hash_vocab_size": 64, "moe_router_dtype": None, "moe_aux_loss_coeff": 0.0}
    assert check(load=save(is_legacy=is_legacy, **fields), **fields) is MissingState.NOTHING


def test_metadata_with_the_plans_of_all_ranks_are_read(save, check):
    """As newer versions of torch save them."""
    folder = save()
    path = folder / "iter_0000002" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    storage = MetadataIndex("args")
    tensor = TensorWriteData(
        ChunkStorageMetadata(torch.Size([0]), torch.Size([1])), TensorProperties(), torch.Size([1])
    )
    items = [
        WriteItem(storage, WriteItemType.TENSOR, tensor_data=tensor),
        WriteItem(storage, WriteItemType.BYTE_IO, bytes_io_data=BytesIOWriteData(nbytes=1)),
    ]
    metadata.all_local_plans = [SavePlan(items)]
    path.write_bytes(pickle.dumps(metadata))
    assert check(load=folder) is MissingState.NOTHING


def test_topk_and_air_load_into_each_other(save, check, is_legacy, capsys):
    assert check(load=save(is_legacy=is_legacy), **AIR) is MissingState.CODEBOOK
    assert "expert centers are kept, codebooks are seeded" in capsys.readouterr().out
    assert check(load=save(iteration=3, is_legacy=is_legacy, **AIR)) is MissingState.NOTHING
    assert "its experts are loaded, its codebooks are not" in capsys.readouterr().out


def test_a_checkpoint_from_before_rebuilds_were_saved_lacks_only_them(save, parsed, check, is_legacy):
    tensors = tensors_of(argparse.Namespace(**vars(parsed) | AIR))
    del tensors["router.index.progress"]
    missing = check(load=save(tensors=tensors, is_legacy=is_legacy, **AIR), **AIR)
    assert missing is MissingState.REBUILD
    assert missing.prefixes == ("index.pool", "index.staged_keys", "index.progress")


def test_without_load_nothing_is_read(check):
    assert check(**AIR) is MissingState.NOTHING


# Where it is.


@pytest.mark.parametrize("content", ["", "\n", "two", "-2", "2.5", "\0\0"])
def test_a_garbled_tracker_is_an_error_that_names_a_whole_iteration(save, check, content):
    folder = save()
    tracker = folder / "latest_checkpointed_iteration.txt"
    tracker.write_text(content)
    with pytest.raises(
        ValueError, match=f"'{tracker}' holds .* instead of an iteration; iteration 2 is whole"
    ) as error:
        check(load=folder)
    assert "\n" not in str(error.value) and "--ckpt-step 2" in str(error.value)
    tracker.unlink()  # as the message says
    assert check(load=folder, ckpt_step=2) is MissingState.NOTHING


def test_a_missing_tracker_beside_iterations_is_an_error(save, check):
    folder = save()
    (folder / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(ValueError, match="iteration.txt' is missing; iteration 2 is whole: add --ckpt-step 2"):
        check(load=folder, save=folder)
    assert check(load=folder, save=folder, ckpt_step=2) is MissingState.NOTHING
    for changes in ({"pretrained_checkpoint": folder}, {"load": folder, "pretrained_checkpoint": folder}):
        with pytest.raises(ValueError, match="iteration.txt' is missing; write one of them into it"):
            check(**changes)


def test_the_folder_of_one_iteration_is_none_to_start_in(save, check, is_legacy, tmp_path):
    """Where `--save` names it too, it would pass for a new one."""
    folder = save(is_legacy=is_legacy) / "iter_0000002"
    released = tmp_path / "released"
    (released / "release").mkdir(parents=True)
    part = "mp_rank_00" if is_legacy else ".metadata"
    for name, found in ((folder, part), (released, "release")):
        with pytest.raises(ValueError, match=f"--load '{name}' holds {found}, a part of a checkpoint, but no file"):
            check(load=name, save=name)


def test_load_without_a_checkpoint_is_an_error_but_for_the_folder_of_save(check, tmp_path):
    new, other = tmp_path / "new", tmp_path / "other"
    other.mkdir()
    assert check(load=new, save=new) is MissingState.NOTHING
    assert check(load=other, save=f"{tmp_path}/new/../other") is MissingState.NOTHING
    for changes in ({}, {"save": new}, {"save": other, "skip_train": True}):
        with pytest.raises(ValueError, match=f"--load '{other}' holds no checkpoint: name a folder that does"):
            check(load=other, **changes)


def test_a_pretrained_checkpoint_is_checked_where_load_is_new(save, check, tmp_path):
    folder = save(**GRANULAR)
    with pytest.raises(ValueError, match=f"--pretrained-checkpoint '{folder}/iter_0000002' holds granular experts"):
        check(load=tmp_path / "new", pretrained_checkpoint=folder)
    with pytest.raises(ValueError, match="--pretrained-checkpoint '.*' holds no checkpoint"):
        check(pretrained_checkpoint=tmp_path / "none")


def test_the_newer_of_two_kinds_of_checkpoint_is_checked(save, check):
    folder = save()
    (folder / "iter_0000002").rename(folder / "iter_0000001")
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
    recent = save(iteration=3, **GRANULAR) / "iter_0000003"
    (folder / "non_persistent").mkdir()
    recent.rename(folder / "non_persistent" / "iter_0000003")
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
    (folder / "non_persistent" / "latest_checkpointed_iteration.txt").write_text("3")
    with pytest.raises(ValueError, match="non_persistent/iter_0000003' holds granular experts"):
        check(load=folder, non_persistent_ckpt_type="global")
    assert check(load=folder) is MissingState.NOTHING


# Whether it is whole.


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garble(path: Path) -> None:
    path.write_bytes(b"garbage" + path.read_bytes()[::-1])


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = [
    *(("metadata.json", damage) for damage in (remove, empty, garble, halve)),
    *((".metadata", damage) for damage in (remove, empty, garble, halve)),
    *(("*.distcp", damage) for damage in (remove, empty, halve)),
]


@pytest.mark.parametrize("pattern, damage", DAMAGES)
def test_a_damaged_checkpoint_names_the_file_and_the_iteration_that_is_whole(save, check, pattern, damage):
    save(iteration=1)
    save(iteration=2)
    folder = save(iteration=3)
    before = {path for path in folder.rglob("*") if "iter_0000003" not in str(path)}
    path = only(folder / "iter_0000003", pattern)
    damage(path)
    with pytest.raises(ValueError) as error:
        check(load=folder, save=folder)
    message = str(error.value)
    assert message.startswith(f"--load '{folder}/iter_0000003' is damaged: '{path}' ")
    assert message.endswith("; iteration 2 is whole: add --ckpt-step 2 to load it")
    assert "\n" not in message
    assert check(load=folder, save=folder, ckpt_step=2) is MissingState.NOTHING
    assert before <= set(folder.rglob("*"))


@pytest.mark.parametrize("damage", [remove, empty, garble, halve])
def test_a_damaged_legacy_checkpoint_names_the_file(save, check, damage):
    save(iteration=1, is_legacy=True)
    folder = save(iteration=2, is_legacy=True)
    damage(folder / "iter_0000002" / "mp_rank_00" / "model_optim_rng.pt")
    with pytest.raises(ValueError, match="damaged: '.*/mp_rank_00/model_optim_rng.pt' .*; iteration 1 is whole"):
        check(load=folder)


def test_a_missing_iteration_and_one_without_any_file(save, check):
    folder = save()
    with pytest.raises(
        ValueError, match="damaged: '?.*iter_0000009' is missing; iteration 2 is whole: add --ckpt-step 2"
    ):
        check(load=folder, ckpt_step=9)
    for path in (folder / "iter_0000002").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="holds no file of a checkpoint; no other iteration in this folder is whole"):
        check(load=folder)


class Attack:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("where", ["metadata", "common-state", "legacy"])
def test_reading_a_checkpoint_runs_none_of_its_code(save, check, tmp_path, where):
    trace = tmp_path / "trace"
    if where == "common-state":
        folder = save(moe_router_topk=Attack(trace))
        assert check(load=folder) is MissingState.NOTHING  # its arguments are not read
    elif where == "metadata":
        folder = save()
        (folder / "iter_0000002" / ".metadata").write_bytes(pickle.dumps(Attack(trace)))
        with pytest.raises(ValueError, match=r".metadata' cannot be read \(UnpicklingError: it asks for "):
            check(load=folder)
    else:
        folder = save(is_legacy=True, moe_router_topk=Attack(trace))
        with pytest.raises(ValueError, match="model_optim_rng.pt' cannot be read"):
            check(load=folder)
    assert not trace.exists()


# All ranks, and the fields of the checkpoint.


def messages_of(check, changes_of_rank: list[dict]) -> list[str]:
    """What each rank of a world is told, or "" where it may start."""
    outcomes = on_ranks(len(changes_of_rank), lambda ranks: check(ranks=ranks, **changes_of_rank[ranks.rank]))
    assert all(outcome is MissingState.NOTHING or isinstance(outcome, ValueError) for outcome in outcomes)
    return ["" if outcome is MissingState.NOTHING else str(outcome) for outcome in outcomes]


def test_every_rank_ends_with_the_same_message(save, check, tmp_path):
    folder, other = save(), tmp_path / "elsewhere"
    assert messages_of(check, [{"load": folder}] * 3) == ["", "", ""]
    outcomes = on_ranks(2, lambda ranks: check(ranks=ranks, load=folder, **AIR))
    assert all(outcome is MissingState.CODEBOOK for outcome in outcomes)
    # A rank that does not see the folder, of which the others know nothing.
    for changes in ({"load": other}, {"load": other, "save": other}):
        messages = messages_of(check, [{"load": folder}, {"load": folder}, changes])
        assert len(set(messages)) == 1
        assert messages[0].startswith("every rank must see the same checkpoint: rank 0 ")
        assert "but on rank 2 " in messages[0]
    save_elsewhere = {"load": folder, "save": folder / "iter_0000002/x/y"}
    messages = messages_of(check, [{"load": folder, "save": other}, save_elsewhere])
    assert messages == ["", ""]
    (tmp_path / "file").write_text("")
    messages = messages_of(check, [{"save": other}, {"save": tmp_path / "file" / "x"}])
    assert len(set(messages)) == 1 and "cannot be written" in messages[0] and "on rank 1 (" in messages[0]
    (folder / "iter_0000002" / "metadata.json").unlink()
    messages = messages_of(check, [{"load": folder}] * 3)
    assert len(set(messages)) == 1 and "metadata.json' is missing" in messages[0]


def test_the_fields_of_a_checkpoint_are_read(save, parsed, megatron_cpu, tmp_path, is_legacy):
    from air_moe_megatron.command.arguments import RECOMMENDED
    from air_moe_megatron.command.checkpoints import fields_of_checkpoint
    from air_moe_megatron.config import LAYOUT_FIELDS, AIRFields

    def fields(**changes):
        return fields_of_checkpoint(argparse.Namespace(**vars(parsed) | changes), ALONE)

    losses = dict(moe_router_load_balancing_type=["aux_loss", "seq_aux_loss"], moe_aux_loss_coeff=[0.01, 0.02])
    of_megatron = losses | dict(moe_router_dtype="fp32")
    folder = save(is_legacy=is_legacy, **AIR, **GRANULAR, **of_megatron)
    found = fields(load=str(folder))
    assert found.keys() == ({name for name in vars(AIRFields())} - set(LAYOUT_FIELDS)) | RECOMMENDED.keys()
    assert found.items() >= (AIR | GRANULAR | of_megatron).items()
    assert json.loads(json.dumps(found)) == found
    new = str(tmp_path / "new")
    assert fields(load=new, save=new) == {}
    save(4, is_legacy=is_legacy, **of_megatron)
    assert fields(load=str(folder), ckpt_step=4) == {}  # of Megatron's own router
    (folder / "latest_checkpointed_iteration.txt").write_text("")
    with pytest.raises(ValueError, match="instead of an iteration"):
        fields(load=str(folder))
