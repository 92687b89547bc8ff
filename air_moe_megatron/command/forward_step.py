"""Microbatches, the forward step and its loss, as in ``pretrain_gpt.py`` of Megatron-LM."""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
    get_model_config,
)
from megatron.training import get_args, get_timers
from megatron.training.training import stimer, update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import is_first_or_last_pipeline_stage

from air_moe_megatron.command.arguments import is_packed

SPIKY_LOSS_FACTOR = 10
"""A loss is reported as spiky when it exceeds this multiple of the largest loss seen so far."""

METADATA_KEYS = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen")
"""Keys of a packed batch that a pipeline stage without embedding, loss or MTP layers needs."""

BATCH_KEYS = METADATA_KEYS + (
    "attention_mask",
    "hybrid_cp_group",
    "labels",
    "local_cp_size",
    "loss_mask",
    "position_ids",
    "tokens",
)


def needs_tokens(config: TransformerConfig, vp_stage: int | None) -> tuple[bool, bool]:
    """Say what this pipeline stage does with tokens and labels.

    Returns:
        (it embeds tokens or computes a loss, it holds multi-token-prediction layers).
    """
    has_mtp = mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )
    return is_first_or_last_pipeline_stage(vp_stage) or has_mtp, has_mtp


def get_batch(data_iterator: Iterator, config: TransformerConfig, vp_stage: int | None = None) -> dict[str, Any]:
    """Fetch this rank's share of the next microbatch.

    Rank 0 of the tensor-parallel group reads it and broadcasts it to its group. Then each context-parallel rank keeps
    its own part of the sequence.

    Args:
        data_iterator: yields dictionaries of CPU tensors; read on tensor-parallel rank 0 only.
        config: the model's configuration.
        vp_stage: index of the virtual pipeline stage; None without virtual stages.
    Returns:
        A dictionary with every key of BATCH_KEYS; None marks what this pipeline stage does not need. tokens, labels,
        position_ids: [microbatch, sequence] int64; loss_mask: the same shape, fp32; cu_seqlens: [1, documents + 1].
    """
    args = get_args()
    packed = is_packed(args)
    tokens_needed, has_mtp = needs_tokens(config, vp_stage)
    if not tokens_needed and not packed:
        return dict.fromkeys(BATCH_KEYS)

    batch = {}
    tp_rank = mpu.get_tensor_model_parallel_rank()
    if tp_rank == 0:
        batch = next(data_iterator)
        for key in BATCH_KEYS:
            value = batch.get(key)
            batch[key] = None if value is None else value.cuda(non_blocking=True)
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=packed,
        is_hybrid_cp=args.hybrid_context_parallel,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=_microbatch_size(args),
        seq_length=args.seq_length,
        mtp_on_this_rank=has_mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = flatten_batch_for_packed_sequences(batch)
    if not tokens_needed:
        return dict.fromkeys(BATCH_KEYS) | {key: batch[key] for key in METADATA_KEYS}
    return get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=args.hybrid_context_parallel,
        cp_group=mpu.get_context_parallel_group(),
        hybrid_cp_group_func=mpu.get_hybrid_data_context_parallel_groups,
        use_per_sequence_balancing=args.dataloader_inter_document_masking and not args.sft,
    )


def _microbatch_size(args: argparse.Namespace) -> int:
    """Sequences of the next microbatch. Without gradients Megatron evaluates: by flags of its own, or one by one."""
    if torch.is_grad_enabled():
        return args.micro_batch_size
    return 1 if args.full_validation else args.eval_micro_batch_size


def packed_sequence_params(batch: dict[str, Any], total_tokens_known: bool) -> PackedSeqParams | None:
    """Describe the document boundaries of a packed batch to attention.

    Waits for the device: lengths become Python integers.

    Args:
        batch: as ``get_batch`` returns it.
        total_tokens_known: also give the number of tokens, which the state-space layers of hybrid models read.
    Returns:
        The parameters, or None if the batch is not packed.
    """
    if batch["cu_seqlens"] is None:
        return None
    cu_seqlens = batch["cu_seqlens"].squeeze(0)  # [documents + 1]
    padded = None if batch["cu_seqlens_padded"] is None else batch["cu_seqlens_padded"].squeeze(0)
    update_seqlen_stats_from_cu_seqlens(cu_seqlens)  # FLOPs are counted over real tokens, not padding

    # Attention takes the padded boundaries in both places, as Megatron's own entry gives them.
    boundaries = cu_seqlens if padded is None else padded
    local_cp_size, max_seqlen = batch["local_cp_size"], int(batch["max_seqlen"].item())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        local_cp_size=None if local_cp_size is None else int(local_cp_size.item()),
        cp_group=batch["hybrid_cp_group"],
        total_tokens=int(boundaries[-1].item()) if total_tokens_known else None,
        tokens_per_sample=get_args().seq_length,
    )


def loss_func(
    loss_mask: torch.Tensor, output_tensor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the losses of the tokens that count.

    Megatron's rerun state machine checks the sum for NaN, infinity and spikes, before any reduction over ranks.

    Args:
        loss_mask: 1 where a token counts, 0 elsewhere; as many elements as ``output_tensor``.
        output_tensor: the model's loss per token, in nats.
    Returns:
        (summed loss, number of tokens that count as int32, {"lm loss": [summed loss, number of tokens]}).
    """
    loss_mask = loss_mask.view(-1).float()
    loss = torch.sum(output_tensor.view(-1).float() * loss_mask)
    num_tokens = loss_mask.sum().clone().detach().to(torch.int)
    validate_loss(loss)
    return loss, num_tokens, {"lm loss": torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])}


def validate_loss(loss: torch.Tensor) -> None:
    """Have the rerun state machine validate this rank's loss by the checks that the flags turn on."""
    args, rerun = get_args(), get_rerun_state_machine()
    checks = []
    if args.check_for_nan_in_loss_and_grad:
        checks.append((torch.isnan, "found NaN in local forward loss calculation", True))
        checks.append((torch.isinf, "found Inf in local forward loss calculation", True))
    if args.check_for_spiky_loss:
        is_spiky = partial(rerun.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss")
        checks.append((is_spiky, "Spiky loss", False))
    for rejection_func, message, fatal in checks:
        # tolerance 0: a forward is deterministic, so a rerun gives the same number unless hardware failed
        rerun.validate_result(loss, rejection_func=rejection_func, message=message, tolerance=0.0, fatal=fatal)


def forward_step(
    data_iterator: Iterator, model: torch.nn.Module, return_schedule_plan: bool = False
) -> tuple[Any, Callable]:
    """Run the model forward on the next microbatch.

    Args:
        data_iterator: see ``get_batch``.
        model: one pipeline stage of the model, wrapped or not.
        return_schedule_plan: return the schedule plan of the forward pass instead of its result, for
            ``--overlap-moe-expert-parallel-comm``.
    Returns:
        (the stage's output or the plan, the function that computes the loss from the output).
    """
    args, timers = get_args(), get_timers()
    timers("batch-generator", log_level=2).start()
    with stimer(bdata=True):
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        batch = get_batch(data_iterator, get_model_config(model), vp_stage)
    packed_seq_params = packed_sequence_params(batch, total_tokens_known=args.hybrid_layer_pattern is not None)
    timers("batch-generator").stop()

    inputs = batch["tokens"], batch["position_ids"], batch["attention_mask"]
    with stimer:
        if return_schedule_plan:
            assert args.overlap_moe_expert_parallel_comm, "only --overlap-moe-expert-parallel-comm asks for a plan"
            output = model.build_schedule_plan(*inputs, labels=batch["labels"], loss_mask=batch["loss_mask"])
        else:
            output = model(
                *inputs, labels=batch["labels"], loss_mask=batch["loss_mask"], packed_seq_params=packed_seq_params
            )
    return output, partial(loss_func, batch["loss_mask"])
