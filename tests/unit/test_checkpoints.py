"""A checkpoint that a run cannot load, or a place where it cannot save, is found before the start and named."""

import argparse
import copy
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import BytesIOWriteData, SavePlan, TensorWriteData, WriteItem, WriteItemType

from air_moe_megatron.command.agreement import Ranks
from air_moe_megatron.routers.lacking import Lacking
from tests.megatron.conftest import MODEL
from tests.unit.test_agreement import on_ranks

LAYERS, EXPERTS, HIDDEN, FFN, CLUSTERS, SHORTLIST = 2, 16, 32, 8, 4, 8
ALONE = Ranks(rank=0, world_size=1, store=None)
AIR = {"moe_router_type": "air", "moe_air_num_clusters": CLUSTERS, "moe_air_shortlist_size": SHORTLIST}
GRANULAR = {"moe_granular_experts": True}
NORM = {"moe_router_input_norm": "running"}


@pytest.fixture(scope="module")
def parsed() -> argparse.Namespace:
    """Megatron's validated arguments of a small top-k model."""
    from megatron.training.arguments import parse_args, validate_args

    from air_moe_megatron import cpu
    from air_moe_megatron.command.arguments import extra_args_provider

    cpu.enable()
    argv, sys.argv = sys.argv, cpu.with_required_flags(["pretrain", "--cpu", *map(str, MODEL), "--mock-data"])
    try:
        args = parse_args(extra_args_provider)
        validate_args(args, {})
    finally:
        sys.argv = argv
        cpu.disable()
    return args


def tensors_of(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """The tensors of a layer that the checks look at, for the router and the experts that the arguments ask for."""
    router = {
        "topk": {"weight": (EXPERTS, HIDDEN)},
        "air": {
            "weight": (EXPERTS, HIDDEN),
            "codebook.codewords": (args.moe_air_num_clusters, HIDDEN),
            "index.shortlist": (args.moe_air_num_clusters, args.moe_air_shortlist_size),
            "index.progress": (2,),
        },
        "product_key": {"keys1": (1, 4, HIDDEN // 2)},
        "hierarchical": {"weight": (EXPERTS, HIDDEN), "group_weight": (4, HIDDEN)},
        "hash": {"table": (64, 2)},
        "vq": {"weight": (EXPERTS, HIDDEN), "codes": (EXPERTS, HIDDEN)},
    }[args.moe_router_type]
    if args.moe_router_input_norm == "running":
        router = router | {"input_norm.mean": (HIDDEN,)}
    if args.moe_router_enable_expert_bias:
        router = router | {"expert_bias": (EXPERTS,)}
    if args.moe_granular_experts:
        experts = {"weight1": (EXPERTS, 2 * FFN, HIDDEN), "weight2": (EXPERTS, FFN, HIDDEN)}
    else:
        experts = {"experts.linear_fc2.weight": (EXPERTS, HIDDEN, FFN)}
    shapes = {f"router.{name}": shape for name, shape in router.items()}
    shapes |= {f"experts.{name}": shape for name, shape in experts.items()}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


@pytest.fixture
def save(parsed, megatron_cpu, tmp_path):
    """A function that saves a small checkpoint: arguments that differ from top-k's -> its folder."""

    def save(iteration=2, tensors=None, args=True, is_legacy=False, **changes) -> Path:
        folder = tmp_path / "saved"
        directory = folder / f"iter_{iteration:07d}"
        saved_by = argparse.Namespace(**vars(parsed) | changes)
        tensors = tensors_of(saved_by) if tensors is None else tensors
        state = {"args": saved_by, "iteration": iteration} if args else {"iteration": iteration}
        if is_legacy:
            expert_parallel = saved_by.expert_model_parallel_size
            state["model"] = {
                f"decoder.layers.{layer}.mlp.{name}": value
                for layer in range(LAYERS)
                for name, value in tensors.items()
            }
            for rank in range(expert_parallel):
                name = "mp_rank_00" if expert_parallel == 1 else f"mp_rank_00_{rank:03d}"
                (directory / name).mkdir(parents=True)
                torch.save(state | {"optimizer": {}}, directory / name / "model_optim_rng.pt")
        else:
            directory.mkdir(parents=True)
            keys = {f"decoder.layers.mlp.{name}": value for name, value in tensors.items()}
            keys = {key: value.expand(LAYERS, *value.shape).contiguous() for key, value in keys.items()}
            if not saved_by.no_save_optim:
                kinds = ["exp_avg", "fp32_param"] if saved_by.bf16 else ["exp_avg"]
                prefix = "distributed.dp_group_idx_0" if saved_by.use_distributed_optimizer else "state"
                keys |= {f"optimizer.{prefix}.{kind}.decoder.final.weight": torch.zeros(HIDDEN) for kind in kinds}
            sharded = {key: ShardedTensor.from_rank_offsets(key, value) for key, value in keys.items()}
            dist_checkpointing.save(state | sharded, str(directory))
        (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
        return folder

    return save


@pytest.fixture
def check(parsed, megatron_cpu):
    """A function that checks a run: its arguments that differ from top-k's -> what the checkpoint lacks."""

    def check(ranks=ALONE, **changes) -> Lacking:
        from air_moe_megatron.command.arguments import transformer_config_from_args
        from air_moe_megatron.command.checkpoints import check_checkpoint

        changes = {name: str(value) if isinstance(value, Path) else value for name, value in changes.items()}
        args = copy.copy(parsed)
        vars(args).update(changes)
        return check_checkpoint(args, transformer_config_from_args(args), ranks)

    return check


@pytest.fixture(params=[False, True], ids=["torch_dist", "legacy"])
def is_legacy(request) -> bool:
    return request.param


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


# What loads.


@pytest.mark.parametrize("fields", [{}, AIR, AIR | GRANULAR, GRANULAR | NORM, {"moe_router_type": "hash"}])
def test_the_run_that_saved_it_passes(save, check, is_legacy, fields):
    if fields.get("moe_router_type") == "hash":
        fields = fields | {"moe_hash_vocab_size": 64, "moe_router_dtype": None, "moe_aux_loss_coeff": 0.0}
    assert check(load=save(is_legacy=is_legacy, **fields), **fields) is Lacking.NOTHING


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
    assert check(load=folder) is Lacking.NOTHING


def test_topk_and_air_load_into_each_other(save, check, is_legacy, capsys):
    assert check(load=save(is_legacy=is_legacy), **AIR) is Lacking.CODEBOOK
    assert "expert centers are kept, codebooks are seeded" in capsys.readouterr().out
    assert check(load=save(iteration=3, is_legacy=is_legacy, **AIR)) is Lacking.NOTHING
    assert "its codebooks are left, its experts are loaded" in capsys.readouterr().out


def test_a_checkpoint_from_before_rebuilds_were_saved_lacks_only_them(save, parsed, check, is_legacy):
    tensors = tensors_of(argparse.Namespace(**vars(parsed) | AIR))
    del tensors["router.index.progress"]
    lacking = check(load=save(tensors=tensors, is_legacy=is_legacy, **AIR), **AIR)
    assert lacking is Lacking.REBUILD
    assert lacking.prefixes == ("index.pool", "index.staged_keys", "index.progress")


def test_without_load_nothing_is_read(check):
    assert check(**AIR) is Lacking.NOTHING


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
    assert check(load=folder, ckpt_step=2) is Lacking.NOTHING


def test_a_missing_tracker_beside_iterations_is_an_error(save, check):
    folder = save()
    (folder / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(ValueError, match="iteration.txt' is missing; iteration 2 is whole: add --ckpt-step 2"):
        check(load=folder, save=folder)
    assert check(load=folder, save=folder, ckpt_step=2) is Lacking.NOTHING
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
    assert check(load=new, save=new) is Lacking.NOTHING
    assert check(load=other, save=f"{tmp_path}/new/../other") is Lacking.NOTHING
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
    assert check(load=folder) is Lacking.NOTHING


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
    assert check(load=folder, save=folder, ckpt_step=2) is Lacking.NOTHING
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
        assert check(load=folder) is Lacking.NOTHING  # its arguments are not read
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


# Whether it fits.

OTHER_MODEL = {
    "experts": ({"num_experts": 32}, "--num-experts (32) must be 16"),
    "rows": ({"moe_ffn_hidden_size": 4}, "--moe-ffn-hidden-size (4) must be 8"),
    "layers": ({"num_layers": 3}, "--num-layers (3) must be 2"),
    "pattern": ({"moe_layer_freq": 2}, "--moe-layer-freq (2) must be 1"),
    "pattern-as-list": ({"moe_layer_freq": [0, 1]}, "--moe-layer-freq ([0, 1]) must be 1"),
    "hidden": ({"hidden_size": 64, "kv_channels": 32}, "--hidden-size (64) must be 32"),
    "activation": ({"swiglu": False}, "--swiglu must be given"),
    "shared-expert": (
        {"moe_shared_expert_intermediate_size": 8},
        "--moe-shared-expert-intermediate-size must be left out",
    ),
    "heads": ({"kv_channels": 32}, "--kv-channels (32) must be 16"),
}


@pytest.mark.parametrize("changes, message", OTHER_MODEL.values(), ids=OTHER_MODEL)
def test_a_model_of_another_shape_is_refused(save, check, is_legacy, changes, message):
    folder = save(is_legacy=is_legacy, **AIR, **GRANULAR)
    with pytest.raises(ValueError) as error:
        check(load=folder, **{**AIR, **GRANULAR, **changes})
    assert str(error.value).endswith(f"was trained with a model of another shape: {message}")


def test_a_dense_gpt_model_is_refused_for_a_hybrid_one_with_experts(save, check):
    with pytest.raises(ValueError, match=r"another shape: --num-experts must be left out$"):
        check(load=save(num_experts=None), hybrid_layer_pattern="M*-E", num_layers=4)


def test_equal_patterns_of_layers_pass_however_they_are_written(save, check):
    assert check(load=save(), moe_layer_freq=[1, 1]) is Lacking.NOTHING


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 32}, r"--num-experts \(32\) must be 16"),
        ({"moe_ffn_hidden_size": 4}, r"--moe-ffn-hidden-size \(4\) must be 8"),
        ({"num_layers": 3}, r"--num-layers \(3\) must be 2"),
        ({"hidden_size": 64, "kv_channels": 32}, r"--hidden-size \(64\) must be 32"),
    ],
)
@pytest.mark.parametrize("fields", [{}, GRANULAR], ids=["modules", "granular"])
def test_without_arguments_the_tensors_tell_the_sizes(save, check, fields, changes, message):
    folder = save(args=False, **fields)
    assert check(load=folder, **fields) is Lacking.NOTHING
    with pytest.raises(ValueError, match=message):
        check(load=folder, **fields, **changes)


PRODUCT_KEYS = {"moe_router_type": "product_key"}
HASH = {"moe_router_type": "hash", "moe_hash_vocab_size": 64, "moe_router_dtype": None, "moe_aux_loss_coeff": 0.0}
HASHED = {"moe_num_hash_layers": 1, "moe_hash_vocab_size": 64}
OTHER_ROUTER = {
    "granular-wanted": ({}, GRANULAR, "holds Megatron's own experts, one module each: train without --moe-granular"),
    "granular-saved": (GRANULAR, {}, "holds granular experts: add --moe-granular-experts"),
    "product-keys-to-hash": (PRODUCT_KEYS, HASH, "type product_key: --moe-router-type hash cannot load them"),
    "hash-to-product-keys": (HASH, PRODUCT_KEYS, "type hash: --moe-router-type product_key cannot load them"),
    "topk-to-product-keys": ({}, PRODUCT_KEYS, "type topk or air: --moe-router-type product_key cannot load them"),
    "hash-to-first-layers": (HASH, AIR | HASHED, "type hash: --moe-router-type air cannot load them"),
    "first-layers-wanted": (
        AIR,
        AIR | HASHED,
        r"was trained with 0 first layers by hash: --moe-num-hash-layers \(1\) must be 0",
    ),
    "norm-left": (GRANULAR | NORM, GRANULAR, r"--moe-router-input-norm \(none\) must be running"),
    "norm-wanted": (GRANULAR, GRANULAR | NORM, r"--moe-router-input-norm \(running\) must be none"),
    "codewords": (AIR, AIR | {"moe_air_num_clusters": 5}, r"\[4, 32\], so --moe-air-num-clusters \(5\) must be 4"),
    "shortlist": (AIR, AIR | {"moe_air_shortlist_size": 9}, r"\[4, 8\], so --moe-air-shortlist-size \(9\) must be 8"),
    "source": (
        AIR,
        AIR | {"moe_air_codebook_source": "experts"},
        r"another form: --moe-air-codebook-source \(experts\) must be tokens",
    ),
    "automatic-shortlist": (
        AIR | {"moe_air_shortlist_size": 16, "moe_router_topk": 2},
        AIR | {"moe_air_num_clusters": 4, "moe_air_shortlist_size": 0, "moe_router_topk": 8, "num_experts": 16},
        None,
    ),
    "hash-balance": (
        HASH,
        HASH | {"moe_hash_balance": "frequency"},
        r"another form: --moe-hash-balance \(frequency\) must be ids$",
    ),
    "list-parts": (AIR, AIR | {"moe_air_list_parts": 2}, r"another form: --moe-air-list-parts \(2\) must be 1$"),
    "hash-seed": (HASH, HASH | {"moe_hash_seed": 3}, r"another form: --moe-hash-seed \(3\) must be 0$"),
    "product-key-size": (
        PRODUCT_KEYS,
        PRODUCT_KEYS | {"moe_product_key_dim": 8},
        r"another form: --moe-product-key-dim \(8\) must be 16",
    ),
    "groups": (
        {"moe_router_type": "hierarchical"},
        {"moe_router_type": "hierarchical", "moe_hierarchical_num_groups": 8},
        r"another form: --moe-hierarchical-num-groups \(8\) must be 4",
    ),
    "bias-lacking": (
        AIR,
        AIR | {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"},
        "holds no expert bias, so --moe-router-enable-expert-bias must be left out",
    ),
}


@pytest.mark.parametrize("skip_train", [False, True], ids=["train", "skip-train"])
@pytest.mark.parametrize("saved, wanted, message", OTHER_ROUTER.values(), ids=OTHER_ROUTER)
def test_another_router_is_refused(save, check, is_legacy, saved, wanted, message, skip_train):
    folder = save(is_legacy=is_legacy, **saved)
    if message is None:
        assert check(load=folder, skip_train=skip_train, **wanted) is Lacking.NOTHING
        return
    with pytest.raises(ValueError, match=message):
        check(load=folder, skip_train=skip_train, **wanted)


def test_a_size_that_was_chosen_automatically_names_what_it_was_chosen_by(save, check):
    folder = save(**AIR | {"moe_air_shortlist_size": 8})
    automatic = AIR | {"moe_air_shortlist_size": 0, "moe_router_topk": 8}
    with pytest.raises(ValueError) as error:
        check(load=folder, **automatic)
    assert str(error.value).endswith(
        "--moe-air-shortlist-size (16) must be 8 "
        "(it was chosen automatically, by --moe-router-topk, which is 8 and was 2)"
    )
    # Another number of experts changes all automatic sizes; the flag that was given is the one that is named.
    with pytest.raises(ValueError, match=r": --num-experts \(1024\) must be 16$"):
        check(load=folder, moe_router_type="air", num_experts=1024)


def test_expert_biases_that_are_not_wanted_are_left_with_a_word(save, check, capsys):
    assert check(load=save(moe_router_enable_expert_bias=True)) is Lacking.NOTHING
    assert "holds expert biases: without --moe-router-enable-expert-bias they are left" in capsys.readouterr().out


BF16 = {"bf16": True, "params_dtype": torch.bfloat16}


@pytest.mark.parametrize("args", [True, False], ids=["with-arguments", "without"])
@pytest.mark.parametrize(
    ("saved", "wanted", "message"),
    [
        ({}, BF16, "holds the optimizer state of fp32 weights: --bf16 must be left out, or add --no-load-optim"),
        (BF16, {}, "holds the optimizer state of bf16 weights: --bf16 must be given, or add --no-load-optim"),
    ],
    ids=["to-bf16", "to-fp32"],
)
def test_the_optimizer_of_another_precision_is_refused(save, check, saved, wanted, message, args):
    folder = save(args=args, **saved)
    with pytest.raises(ValueError, match=message):
        check(load=folder, **wanted)
    for remedy in ({"no_load_optim": True}, {"finetune": True}, {"skip_train": True}):
        assert check(load=folder, **wanted, **remedy) is Lacking.NOTHING


@pytest.mark.parametrize("args", [True, False])
def test_a_checkpoint_without_optimizer_state(save, check, args):
    folder = save(no_save_optim=True, args=args)
    words = "holds no optimizer state: add --no-load-optim to start optimizer and learning-rate schedule anew"
    with pytest.raises(ValueError, match=words):
        check(load=folder)
    assert check(load=folder, no_load_optim=True) is Lacking.NOTHING


OTHER_SCHEDULE = {
    "longer": ({"train_iters": 50}, r"--train-iters \(50\) must be 2"),
    "batch": ({"global_batch_size": 64}, r"--global-batch-size \(64\) must be 2"),
    "rate": ({"lr": 0.5, "lr_decay_style": "cosine"}, r"--lr \(0.5\) must be .*, --lr-decay-style \(cosine\) must be"),
    "warm-up": ({"lr_warmup_iters": 1}, r"--lr-warmup-iters \(1\) must be 0"),
    "decay": ({"end_weight_decay": 0.5}, r"--end-weight-decay \(0.5\) must be "),
}


@pytest.mark.parametrize("changes, message", OTHER_SCHEDULE.values(), ids=OTHER_SCHEDULE)
def test_another_schedule_is_refused_unless_it_is_chosen(save, check, is_legacy, changes, message):
    schedule = {"train_iters": 2, "global_batch_size": 2, "lr_warmup_iters": 0}
    folder, changes = save(is_legacy=is_legacy, **schedule), schedule | changes
    assert check(load=folder, **schedule) is Lacking.NOTHING
    with pytest.raises(ValueError, match=f"goes on with the schedule that it was trained with: {message}.*; or add"):
        check(load=folder, **changes)
    for choice in ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler", "finetune", "no_load_optim"):
        assert check(load=folder, **changes, **{choice: True}) is Lacking.NOTHING


def test_a_schedule_that_is_the_same_in_other_words_passes(save, check):
    folder = save(train_iters=8, lr_decay_iters=8, lr_warmup_fraction=0.25)  # as Megatron fills them in
    assert check(load=folder, train_iters=8, lr_warmup_iters=2) is Lacking.NOTHING
    with pytest.raises(ValueError, match=r"--train-iters \(9\) must be 8"):
        check(load=folder, train_iters=9, lr_warmup_iters=2)


def test_the_legacy_format_is_bound_to_its_layout(save, check):
    folder = save(is_legacy=True, expert_model_parallel_size=2, world_size=2)
    with pytest.raises(ValueError, match=r"legacy format 'torch', .*: --expert-model-parallel-size \(1\) must be 2"):
        check(load=folder)
    same = {"load": folder, "expert_model_parallel_size": 2, "world_size": 2}
    assert check(**same) is Lacking.NOTHING
    path = folder / "iter_0000002" / "mp_rank_00_001" / "model_optim_rng.pt"
    path.rename(path.with_name("elsewhere"))
    with pytest.raises(ValueError, match=f"'{path}' is missing; no other iteration"):
        check(**same)


def test_the_flag_of_the_other_format_is_refused(save, check):
    folder = save()
    with pytest.raises(ValueError, match=r"format torch_dist: --ckpt-format \(torch\) must be torch_dist"):
        check(load=folder, ckpt_format="torch")
    assert check(load=folder, ckpt_format="torch", auto_detect_ckpt_format=True) is Lacking.NOTHING


# Where the run saves, and whether it can resume.


def test_a_folder_that_cannot_be_written_is_refused(check, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--save '.*/file/run' cannot be written: Not a directory in .*, on rank 0"):
        check(save=tmp_path / "file" / "run")
    assert check(save=tmp_path / "a" / "b") is Lacking.NOTHING
    assert not (tmp_path / "a").exists()
    assert check(save=tmp_path / "file" / "run", skip_train=True) is Lacking.NOTHING
    with pytest.raises(ValueError, match=r"--tensorboard-dir '.*/file' cannot be written: Not a directory in .*/file'"):
        check(tensorboard_dir=str(tmp_path / "file"))
    assert check(tensorboard_dir=str(tmp_path / "a")) is Lacking.NOTHING
    assert check(tensorboard_dir=str(tmp_path / "file"), world_size=2) is Lacking.NOTHING  # the last rank writes


def test_a_file_system_without_room_is_refused(check, tmp_path):
    huge = {"num_experts": 2**30, "moe_ffn_hidden_size": 2**20}
    needed = r"\d{7,}\.\d GiB: free some"
    with pytest.raises(ValueError, match=rf"--save '.*' has \d+\.\d GiB free, and .* takes at least {needed}"):
        check(save=tmp_path, **huge)
    assert check(**huge) is Lacking.NOTHING


def test_the_estimate_counts_what_it_says(parsed, megatron_cpu):
    from air_moe_megatron.command.arguments import transformer_config_from_args
    from air_moe_megatron.command.checkpoints.saving import estimate_bytes

    def estimate(**changes):
        args = argparse.Namespace(**vars(parsed) | {"padded_vocab_size": 64} | changes)
        return estimate_bytes(args, transformer_config_from_args(args))

    num_values = 2 * 64 * HIDDEN + LAYERS * EXPERTS * (3 * HIDDEN * FFN + HIDDEN)
    assert num_values == 29_696
    assert estimate() == num_values * (4 + 8)
    assert estimate(**BF16) == num_values * (2 + 4 + 8)
    assert estimate(no_save_optim=True) == num_values * 4
    assert estimate(moe_layer_freq=[0, 1]) == (num_values - EXPERTS * (3 * HIDDEN * FFN + HIDDEN)) * 12
    latent = {"moe_latent_size": HIDDEN // 4, "moe_granular_experts": False, "moe_dispatch": "stock"}
    assert estimate(**latent) == (num_values - LAYERS * EXPERTS * 3 * HIDDEN * FFN * 3 // 4) * 12


def test_a_distributed_optimizer_that_cannot_resume_is_refused(save, check, is_legacy, tmp_path, monkeypatch):
    from air_moe_megatron.command.checkpoints import saving

    distributed = {"use_distributed_optimizer": True}
    with pytest.raises(ValueError, match="without Transformer Engine or Apex .* or add --no-save-optim"):
        check(save=tmp_path, **distributed)
    assert check(**distributed) is Lacking.NOTHING
    assert check(save=tmp_path, no_save_optim=True, **distributed) is Lacking.NOTHING
    folder = save(is_legacy=is_legacy, **distributed)
    with pytest.raises(ValueError, match="without Transformer Engine or Apex .* or add --no-load-optim"):
        check(load=folder, **distributed)
    assert check(load=folder, no_load_optim=True, **distributed) is Lacking.NOTHING
    monkeypatch.setattr(saving, "HAVE_APEX_OR_TE", True)
    assert check(load=folder, save=tmp_path, **distributed) is Lacking.NOTHING
    with pytest.raises(ValueError, match="another kind of optimizer: --use-distributed-optimizer must be given"):
        check(load=folder)


# All ranks, and the fields of the checkpoint.


def messages_of(check, changes_of_rank: list[dict]) -> list[str]:
    """What each rank of a world is told, or "" where it may start."""
    outcomes = on_ranks(len(changes_of_rank), lambda ranks: check(ranks=ranks, **changes_of_rank[ranks.rank]))
    assert all(outcome is Lacking.NOTHING or isinstance(outcome, ValueError) for outcome in outcomes)
    return ["" if outcome is Lacking.NOTHING else str(outcome) for outcome in outcomes]


def test_every_rank_ends_with_the_same_message(save, check, tmp_path):
    folder, other = save(), tmp_path / "elsewhere"
    assert messages_of(check, [{"load": folder}] * 3) == ["", "", ""]
    outcomes = on_ranks(2, lambda ranks: check(ranks=ranks, load=folder, **AIR))
    assert all(outcome is Lacking.CODEBOOK for outcome in outcomes)
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
