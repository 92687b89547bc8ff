"""A checkpoint of another model, router, optimizer, schedule or format is refused before the start."""

import pytest

from air_moe_megatron.routers.missing_state import MissingState
from tests.saved import AIR, BF16, GRANULAR, NORM

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
    assert check(load=save(), moe_layer_freq=[1, 1]) is MissingState.NOTHING


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
    assert check(load=folder, **fields) is MissingState.NOTHING
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
        assert check(load=folder, skip_train=skip_train, **wanted) is MissingState.NOTHING
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
    with pytest.raises(ValueError, match=r"chosen automatically, by --moe-air-num-probes, which is 1 and was \d\)"):
        check(load=folder, **AIR | {"moe_air_shortlist_size": 0, "moe_air_num_probes": 1})
    # Another number of experts changes all automatic sizes; the flag that was given is the one that is named.
    with pytest.raises(ValueError, match=r": --num-experts \(1024\) must be 16$"):
        check(load=folder, moe_router_type="air", num_experts=1024)


def test_expert_biases_that_are_not_wanted_are_left_with_a_word(save, check, capsys):
    assert check(load=save(moe_router_enable_expert_bias=True)) is MissingState.NOTHING
    assert "holds expert biases: without --moe-router-enable-expert-bias they are left" in capsys.readouterr().out


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
        assert check(load=folder, **wanted, **remedy) is MissingState.NOTHING


@pytest.mark.parametrize("args", [True, False])
def test_a_checkpoint_without_optimizer_state(save, check, args):
    folder = save(no_save_optim=True, args=args)
    words = "holds no optimizer state: add --no-load-optim to start optimizer and learning-rate schedule anew"
    with pytest.raises(ValueError, match=words):
        check(load=folder)
    assert check(load=folder, no_load_optim=True) is MissingState.NOTHING


OTHER_SCHEDULE = {
    "longer": ({"train_iters": 50}, r"--train-iters \(50\) must be 2"),
    "batch": ({"global_batch_size": 64}, r"--global-batch-size \(64\) must be 2"),
    "style": ({"lr_decay_style": "cosine"}, r"--lr-decay-style \(cosine\) must be"),
    "warm-up": ({"lr_warmup_iters": 1}, r"--lr-warmup-iters \(1\) must be 0"),
    "decay": ({"end_weight_decay": 0.5}, r"--end-weight-decay \(0.5\) must be "),
}


@pytest.mark.parametrize("changes, message", OTHER_SCHEDULE.values(), ids=OTHER_SCHEDULE)
def test_another_schedule_is_refused_unless_it_is_chosen(save, check, is_legacy, changes, message):
    schedule = {"train_iters": 2, "global_batch_size": 2, "lr_warmup_iters": 0}
    folder, changes = save(is_legacy=is_legacy, **schedule), schedule | changes
    assert check(load=folder, **schedule) is MissingState.NOTHING
    with pytest.raises(ValueError, match=f"goes on with the schedule that it was trained with: {message}.*; or add"):
        check(load=folder, **changes)
    for choice in ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler", "finetune", "no_load_optim"):
        assert check(load=folder, **changes, **{choice: True}) is MissingState.NOTHING


@pytest.mark.parametrize("name", ["lr", "min_lr", "decoupled_lr"])
def test_another_learning_rate_is_refused_whatever_schedule_is_chosen(save, check, is_legacy, name):
    folder, changes = save(is_legacy=is_legacy, lr=0.5), {"lr": 0.5} | {name: 0.25}
    flag = f"--{name.replace('_', '-')}"
    for choice in ({}, {"override_opt_param_scheduler": True}, {"use_checkpoint_opt_param_scheduler": True}):
        with pytest.raises(ValueError, match=rf"finds by its learning rates: {flag} .*must .*--no-load-optim"):
            check(load=folder, **changes, **choice)
    for choice in ("finetune", "no_load_optim"):
        assert check(load=folder, **changes, **{choice: True}) is MissingState.NOTHING


def test_a_schedule_that_is_the_same_in_other_words_passes(save, check):
    folder = save(train_iters=8, lr_decay_iters=8, lr_warmup_fraction=0.25)  # as Megatron fills them in
    assert check(load=folder, train_iters=8, lr_warmup_iters=2) is MissingState.NOTHING
    with pytest.raises(ValueError, match=r"--train-iters \(9\) must be 8"):
        check(load=folder, train_iters=9, lr_warmup_iters=2)


def test_the_legacy_format_is_bound_to_its_layout(save, check):
    folder = save(is_legacy=True, expert_model_parallel_size=2, world_size=2)
    with pytest.raises(ValueError, match=r"legacy format 'torch', .*: --expert-model-parallel-size \(1\) must be 2"):
        check(load=folder)
    same = {"load": folder, "expert_model_parallel_size": 2, "world_size": 2}
    assert check(**same) is MissingState.NOTHING
    path = folder / "iter_0000002" / "mp_rank_00_001" / "model_optim_rng.pt"
    path.rename(path.with_name("elsewhere"))
    with pytest.raises(ValueError, match=f"'{path}' is missing; no other iteration"):
        check(**same)


def test_the_flag_of_the_other_format_is_refused(save, check):
    folder = save()
    with pytest.raises(ValueError, match=r"format torch_dist: --ckpt-format \(torch\) must be torch_dist"):
        check(load=folder, ckpt_format="torch")
    assert check(load=folder, ckpt_format="torch", auto_detect_ckpt_format=True) is MissingState.NOTHING
