"""Check that a checkpoint fits the run that will load it. Each check raises at most one ValueError."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.training.utils import print_rank_0

from air_moe_megatron.command.arguments import bare_pattern, has_experts_by_layer
from air_moe_megatron.command.checkpoints.reader import LEGACY_FILE, Checkpoint, Damaged
from air_moe_megatron.command.console import flag_of
from air_moe_megatron.command.schedule import schedule_of
from air_moe_megatron.config import AIRFields, Problems, num_hash_layers, passed_on, problem_of, resolve_sizes
from air_moe_megatron.routers import ROUTERS
from air_moe_megatron.routers.base import CompactRouter
from air_moe_megatron.routers.missing_state import MissingState

_GIVEN_SIZES = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_experts",
    "hybrid_layer_pattern",
    "swiglu",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
)
"""Arguments that shape the model."""

_DERIVED_SIZES = ("moe_layer_freq", "ffn_hidden_size", "kv_channels", "num_query_groups")
"""Arguments that shape it too. They are compared by layer, or derived from the others if they are not given."""

_LEGACY_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
"""The parallel sizes that the legacy format depends on."""

_OF_PARAMETER_GROUPS = ("lr", "min_lr", "decoupled_lr", "decoupled_min_lr")
"""Arguments by which Megatron finds the groups of parameters in a saved optimizer state."""

_OF_SCHEDULE = (
    *("train_iters", "train_samples", "global_batch_size", "lr_decay_style", "lr_decay_iters"),
    *("lr_decay_samples", "lr_warmup_fraction", "lr_warmup_iters", "lr_warmup_samples"),
    *("start_weight_decay", "end_weight_decay", "weight_decay_incr_style"),
)
"""Arguments that determine the schedule of learning rate and weight decay, beside the rates themselves."""

_CODEWORDS = "router.codebook.codewords"


def unfit_contents(
    checkpoint: Checkpoint, args: argparse.Namespace, config: TransformerConfig
) -> Problems[MissingState]:
    """Yield a ValueError for each reason that a run cannot load a checkpoint, with the flag, its value and the remedy.

    Top-k and AIR differ only in the codebooks, so each loads into the other. A missing codebook is learned anew, an
    unneeded one is not loaded. Routers of other types have parameters of their own. Older checkpoints of AIR do not
    hold an unfinished rebuild of the lists; it then begins anew.

    Returns:
        the state that the run's AIR routers have and the checkpoint does not hold.
    """
    router_type = getattr(config, "moe_router_type", "topk")
    if checkpoint.is_legacy:
        yield from problem_of(_check_layout, checkpoint, args)
    elif args.ckpt_format == "torch" and not args.auto_detect_ckpt_format:
        yield ValueError(f"{checkpoint.location} is in the format torch_dist: --ckpt-format (torch) must be torch_dist")
    of_other_size = yield from passed_on(problem_of(_check_sizes, checkpoint, args))
    yield from problem_of(_check_experts, checkpoint, getattr(config, "moe_granular_experts", False))
    of_other_type = yield from passed_on(problem_of(_check_router, checkpoint, router_type))
    if not of_other_type:
        of_other_type = yield from passed_on(problem_of(_check_hash_layers, checkpoint, config))
    yield from problem_of(_check_input_norm, checkpoint, getattr(config, "moe_router_input_norm", "none"))
    yield from problem_of(_check_expert_bias, checkpoint, config)
    yield from problem_of(_check_optimizer, checkpoint, args)
    if of_other_size or of_other_type:
        return MissingState.NOTHING
    missing = _missing_state(checkpoint, router_type)
    if router_type != "topk" and missing is not MissingState.CODEBOOK:
        yield from problem_of(_check_fields, checkpoint, config, ROUTERS[router_type])
    if num_hash_layers(config):
        yield from problem_of(_check_fields, checkpoint, config, ROUTERS["hash"])
    if router_type == "air":
        yield from problem_of(_check_codebooks, checkpoint, config)
    if missing is MissingState.CODEBOOK:
        _print_origin(checkpoint, "top-k routing: expert centers are kept, codebooks are seeded from the first batch")
    if router_type != "air" and checkpoint.has(_CODEWORDS):
        _print_origin(checkpoint, "AIR routing: its experts are loaded, its codebooks are not")
    return missing


def _missing_state(checkpoint: Checkpoint, router_type: str) -> MissingState:
    if router_type != "air":
        return MissingState.NOTHING
    if not checkpoint.has(_CODEWORDS):
        return MissingState.CODEBOOK
    return MissingState.NOTHING if checkpoint.has("router.index.progress") else MissingState.REBUILD


def _print_origin(checkpoint: Checkpoint, origin: str) -> None:
    print_rank_0(f"> {checkpoint.location.directory} was trained with {origin}")


def loads_optimizer(args: argparse.Namespace, checkpoint: Checkpoint) -> bool:
    """Whether Megatron will load the optimizer's state from a checkpoint. It then fails if there is none."""
    starts_anew = args.finetune or checkpoint.location.flag == "--pretrained-checkpoint"
    is_whole = checkpoint.location.name != "release"
    return is_whole and not (starts_anew or args.no_load_optim or args.skip_train)


def _demand(name: str, own: Any, found: Any) -> str:
    """Tell the user what to do about one argument that differs."""
    given = "not given" if own is None or own is False else str(own)
    if found is None or found is False:
        return f"{flag_of(name)} must be left out"
    return f"{flag_of(name)} must be given" if found is True else f"{flag_of(name)} ({given}) must be {found}"


def _check_layout(checkpoint: Checkpoint, args: argparse.Namespace) -> None:
    """Require the same parallel sizes: the legacy format has one file per rank."""
    sizes = [(name, getattr(args, name), getattr(checkpoint.args, name, getattr(args, name))) for name in _LEGACY_SIZES]
    demands = [_demand(name, own, found) for name, own, found in sizes if own != found]
    if demands:
        raise ValueError(
            f"{checkpoint.location} is in the legacy format 'torch', which loads only with the sizes that saved it: "
            + ", ".join(demands)
        )
    if args.use_tp_pp_dp_mapping:
        return  # it numbers ranks in another way
    for folder in sorted({_legacy_folder(rank, args) for rank in range(args.world_size)}):
        path = checkpoint.location.directory / folder / LEGACY_FILE
        if not path.is_file():
            raise Damaged(f"'{path}' is missing")


def _legacy_folder(rank: int, args: argparse.Namespace) -> str:
    """The folder that a rank reads in the legacy format."""
    tensor, pipeline, expert = (getattr(args, name) for name in _LEGACY_SIZES)
    stage = rank // (args.world_size // pipeline)
    name = f"mp_rank_{rank % tensor:02d}" + (f"_{stage:03d}" if pipeline > 1 else "")
    return name + (f"_{rank // args.expert_tensor_parallel_size % expert:03d}" if expert > 1 else "")


def _check_sizes(checkpoint: Checkpoint, args: argparse.Namespace) -> None:
    """Require the model to have the shape that was saved."""
    own = _sizes_of_arguments(args)
    if checkpoint.args is not None:
        found = _sizes_of_arguments(checkpoint.args)
        if own["hybrid_layer_pattern"] is not None and found["hybrid_layer_pattern"] is None:
            for name in ("num_layers", "moe_layer_freq", "hybrid_layer_pattern"):
                found.pop(name, None)  # Megatron pairs the layers of a GPT checkpoint with those of a hybrid model
    else:  # a rank's file of the legacy format holds only a part of the experts
        found = {} if checkpoint.is_legacy else _sizes_of_tensors(checkpoint.shapes)
    for names in (_GIVEN_SIZES, _DERIVED_SIZES):  # a derived size is not reported beside those that determine it
        demands = [
            _demand(name, _shown(own[name], args, name), _shown(found[name], checkpoint.args, name))
            for name in names
            if name in found and name in own and own[name] != found[name]
        ]
        if demands:
            raise ValueError(f"{checkpoint.location} was trained with a model of another shape: " + ", ".join(demands))


def _shown(value: Any, args: argparse.Namespace | None, name: str) -> Any:
    """The value of a flag as it was given, because layers with experts are compared one by one."""
    return args.moe_layer_freq if name == "moe_layer_freq" and args is not None else value


def _sizes_of_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that shape a model, without those that have no effect."""
    sizes = {name: getattr(args, name) for name in (*_GIVEN_SIZES, *_DERIVED_SIZES) if hasattr(args, name)}
    # Older checkpoints use an older name of the pattern.
    pattern = sizes.get("hybrid_layer_pattern") or getattr(args, "hybrid_override_pattern", None)
    sizes["hybrid_layer_pattern"] = None if pattern is None else bare_pattern(pattern)
    layers = has_experts_by_layer(argparse.Namespace(**vars(args) | {"hybrid_layer_pattern": pattern}))
    unused = set()
    if pattern is not None:
        unused |= {"num_layers", "moe_layer_freq"}  # derived from the pattern
    if not getattr(args, "group_query_attention", False):
        unused.add("num_query_groups")
    if all(layers):
        unused.add("ffn_hidden_size")
    if sizes.setdefault("num_experts", None) is None:
        unused |= {"moe_layer_freq", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"}
    else:
        sizes["moe_ffn_hidden_size"] = args.moe_ffn_hidden_size or args.ffn_hidden_size
        sizes["moe_layer_freq"] = layers
    return {name: value for name, value in sizes.items() if name not in unused}


def _sizes_of_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """The sizes that follow from the shapes of tensors, for a checkpoint without arguments."""
    sizes = {}
    for key, shape in shapes.items():
        if key.startswith("decoder.layers.mlp.router."):  # layers of one form are stacked
            sizes["num_layers"] = shape[0]
        if key.endswith("mlp.router.weight"):
            sizes["num_experts"], sizes["hidden_size"] = shape[-2:]
        elif key.endswith("mlp.experts.weight2"):
            sizes["num_experts"], sizes["moe_ffn_hidden_size"], sizes["hidden_size"] = shape[-3:]
        elif key.endswith("mlp.experts.experts.linear_fc2.weight"):
            sizes["num_experts"], sizes["hidden_size"], sizes["moe_ffn_hidden_size"] = shape[-3:]
    return sizes


def _check_experts(checkpoint: Checkpoint, granular: bool) -> None:
    """Require the same form of experts: the two forms have different parameters."""
    has_granular = checkpoint.has("mlp.experts.weight1")
    has_modules = any(".mlp.experts." in key for key in checkpoint.shapes) and not has_granular
    if granular and has_modules:
        raise ValueError(
            f"{checkpoint.location} holds Megatron's own experts, one module each: train without --moe-granular-experts"
        )
    if has_granular and not granular:
        raise ValueError(f"{checkpoint.location} holds granular experts: add --moe-granular-experts")


def _check_router(checkpoint: Checkpoint, router_type: str) -> None:
    """Require the same router type, because parameters differ by type. Only top-k and AIR load into each other."""
    hashed = _hashed_layers(checkpoint)
    routers = {
        name
        for layer, _, name in (key.partition(".router.") for key in checkpoint.shapes)
        if name and layer not in hashed
    }
    if not routers and not hashed:
        return
    if not routers:
        routers = {ROUTERS["hash"].checkpoint_key}
    found = next((name for name, router in ROUTERS.items() if router.checkpoint_key in routers), None)
    if found != (router_type if ROUTERS[router_type].checkpoint_key is not None else None):
        raise ValueError(
            f"{checkpoint.location} holds routers of type {found or 'topk or air'}: "
            f"--moe-router-type {router_type} cannot load them"
        )


def _hashed_layers(checkpoint: Checkpoint) -> set[str]:
    """Name prefixes of the layers with a hash router; a single one if all layers are stacked."""
    ending = ".router." + ROUTERS["hash"].checkpoint_key
    return {key.removesuffix(ending) for key in checkpoint.shapes if key.endswith(ending)}


def _check_hash_layers(checkpoint: Checkpoint, config: TransformerConfig) -> None:
    """Require the same number of first layers by hash: they have no centers and are saved layer by layer."""
    is_stacked = any(key.startswith("decoder.layers.mlp.router.") for key in checkpoint.shapes)
    has_routers = any(".router." in key for key in checkpoint.shapes)
    if not has_routers or getattr(config, "moe_router_type", "topk") == "hash":
        return
    own, found = num_hash_layers(config), 0 if is_stacked else len(_hashed_layers(checkpoint))
    if own != found:
        raise ValueError(
            f"{checkpoint.location} was trained with {found} first layers by hash: --moe-num-hash-layers ({own}) must "
            f"be {found}"
        )


def _check_input_norm(checkpoint: Checkpoint, norm: str) -> None:
    """Require the same input norm: centers do not fit tokens that are normalized in another way."""
    has_routers = any(".router." in key for key in checkpoint.shapes)
    found = "running" if checkpoint.has("router.input_norm.mean") else "none"
    if checkpoint.has("router.input_norm.basis"):
        found = "low_rank_whitening"
    if checkpoint.has("router.input_norm.covariance"):
        found = "whitening"
    if has_routers and found != norm:
        raise ValueError(
            f"{checkpoint.location} was trained with --moe-router-input-norm {found}, so --moe-router-input-norm "
            f"({norm}) must be {found}"
        )


def _check_expert_bias(checkpoint: Checkpoint, config: TransformerConfig) -> None:
    """Require an expert bias if the run uses one: Megatron cannot load a missing bias, but ignores an unneeded one."""
    has_bias = checkpoint.has("router.expert_bias")
    if config.moe_router_enable_expert_bias and not has_bias:
        raise ValueError(
            f"{checkpoint.location} holds no expert bias, so --moe-router-enable-expert-bias must be left out"
        )
    if has_bias and not config.moe_router_enable_expert_bias:
        print_rank_0(
            f"> {checkpoint.location.directory} holds expert biases: without --moe-router-enable-expert-bias they are "
            "left, and the experts are chosen without them"
        )


def _check_optimizer(checkpoint: Checkpoint, args: argparse.Namespace) -> None:
    """Require the same kind of optimizer and precision of the weights if the optimizer's state is loaded."""
    if not loads_optimizer(args, checkpoint):
        return
    location, anew = checkpoint.location, "add --no-load-optim to start optimizer and learning-rate schedule anew"
    if not checkpoint.optimizer_keys:
        raise ValueError(f"{location} holds no optimizer state: {anew}")
    remedy = f"or {anew}"
    saved_by = checkpoint.args
    own = args.use_distributed_optimizer
    if checkpoint.is_legacy:
        was = getattr(saved_by, "use_distributed_optimizer", False)
    else:
        was = any(".distributed." in key for key in checkpoint.optimizer_keys)
    # In torch_dist, Megatron also loads the state of a plain optimizer into a distributed one.
    if own != was and (was or checkpoint.is_legacy):
        demand = _demand("use_distributed_optimizer", own, was)
        raise ValueError(f"{location} holds the state of another kind of optimizer: {demand}, {remedy}")
    precision = _low_precision(args)
    if saved_by is not None:
        found = _low_precision(saved_by)
    else:
        found = "bf16" if any(".fp32_param." in key for key in checkpoint.optimizer_keys) else None
    if (precision is None) != (found is None):
        demand = f"--{precision} must be left out" if found is None else f"--{found} must be given"
        raise ValueError(
            f"{location} holds the optimizer state of {'fp32' if found is None else found} weights: {demand}, {remedy}"
        )


def check_schedule(checkpoint: Checkpoint, args: argparse.Namespace) -> None:
    """Require the saved learning rates, and the saved schedule unless a flag chooses between both schedules.

    Raises:
        ValueError: naming the flags that differ and what else can be done.
    """
    saved_by = checkpoint.args
    if saved_by is None or not loads_optimizer(args, checkpoint):
        return
    rates = _demands(_OF_PARAMETER_GROUPS, args, saved_by)
    if rates:
        raise ValueError(
            f"{checkpoint.location} holds an optimizer state that Megatron finds by its learning rates: "
            f"{', '.join(rates)}; or add --no-load-optim to start optimizer and learning-rate schedule anew"
        )
    own, found = schedule_of(args), schedule_of(saved_by)
    chooses = args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler
    if chooses or not own or not found or own == found:
        return
    raise ValueError(
        f"{checkpoint.location} goes on with the schedule that it was trained with: "
        f"{', '.join(_demands(_OF_SCHEDULE, args, saved_by))}; or add "
        "--override-opt-param-scheduler for the new schedule, or --use-checkpoint-opt-param-scheduler for the old one"
    )


def _demands(names: Sequence[str], args: argparse.Namespace, saved_by: argparse.Namespace) -> list[str]:
    """What to do about each argument that differs from the saved one; about those that are given, if any is."""
    changed = [name for name in names if getattr(args, name, None) != getattr(saved_by, name, None)]
    given = [name for name in changed if getattr(args, name, None) is not None]
    return [_demand(name, getattr(args, name), getattr(saved_by, name, None)) for name in given or changed]


def _low_precision(args: argparse.Namespace) -> str | None:
    return next((name for name in ("bf16", "fp16") if getattr(args, name)), None)


def _check_fields(checkpoint: Checkpoint, config: TransformerConfig, router: type[CompactRouter]) -> None:
    """Require the saved values of the fields that a router's parameters depend on."""
    if checkpoint.args is None:
        return
    defaults = {field.name: field.default for field in dataclasses.fields(AIRFields)}
    values = defaults | vars(checkpoint.args)
    saved = argparse.Namespace(**values, num_moe_experts=values["num_experts"])
    own, found = router.checkpoint_fields(config), router.checkpoint_fields(saved)
    demands = [
        _demand(name, own[name], found[name]) + _note_on_automatic_size(name, config, saved)
        for name in own
        if own[name] != found[name]
    ]
    if demands:
        raise ValueError(f"{checkpoint.location} holds routers of another form: " + ", ".join(demands))


def _check_codebooks(checkpoint: Checkpoint, config: TransformerConfig) -> None:
    """Require codebooks and shortlists to have the sizes of the run."""
    sizes = resolve_sizes(config)
    clusters, shortlist = sizes.num_clusters, sizes.shortlist_size
    expected = {
        _CODEWORDS: (("moe_air_num_clusters", clusters), ("hidden_size", config.hidden_size)),
        "router.index.shortlist": (("moe_air_num_clusters", clusters), ("moe_air_shortlist_size", shortlist)),
    }
    for key, shape in checkpoint.shapes.items():
        fields = next((fields for ending, fields in expected.items() if key.endswith(ending)), ())
        for (name, own), found in zip(fields, shape[-2:], strict=False):
            if own != found:
                raise ValueError(
                    f"{checkpoint.location}: {key} is {list(shape[-2:])}, so {_demand(name, own, found)}"
                    + _note_on_automatic_size(name, config, checkpoint.args)
                )


def _note_on_automatic_size(name: str, config: TransformerConfig, saved_by: argparse.Namespace | None) -> str:
    """A note on a size that was chosen automatically, naming the argument that caused the difference, if any."""
    if getattr(config, name) != 0 or name == "moe_hash_seed":
        return ""
    causes = {
        "moe_air_shortlist_size": ("moe_router_topk", "moe_air_num_probes"),
        "moe_product_key_heads": ("moe_router_topk",),
    }
    values = [(cause, getattr(config, cause)) for cause in causes.get(name, ())]
    changed = [(cause, own, getattr(saved_by, cause, own)) for cause, own in values]
    by = [f"{flag_of(cause)}, which is {own} and was {was}" for cause, own, was in changed if own != was]
    return f" (it was chosen automatically{''.join(f', by {one}' for one in by)})"
