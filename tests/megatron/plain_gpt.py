"""A GPT pretraining script that knows nothing of this package: what a Megatron user's own script does, at its least."""

from functools import partial

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, pretrain
from megatron.training.utils import get_blend_and_blend_per_split


def datasets(num_samples, vp_stage=None):
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
    )
    return BlendedMegatronDatasetBuilder(
        GPTDataset, num_samples, lambda: mpu.get_tensor_model_parallel_rank() == 0, config
    ).build()


def loss(loss_mask, output):
    mask = loss_mask.view(-1).float()
    total = torch.sum(output.view(-1).float() * mask)
    count = mask.sum().to(torch.int)
    return total, count, {"lm loss": torch.cat([total.detach().view(1), count.view(1)])}


def forward(data_iterator, model):
    batch = {key: value.cuda() for key, value in next(data_iterator).items() if isinstance(value, torch.Tensor)}
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch.get("attention_mask"),
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(loss, batch["loss_mask"])


def provide_model(pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None):
    """What a script does before megatron-core 0.19, which brought GPTModelConfig."""
    args = get_args()
    try:
        from megatron.training.argument_utils import core_transformer_config_from_args
    except ImportError:  # 0.17
        from megatron.training.arguments import core_transformer_config_from_args
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    config = config or core_transformer_config_from_args(args)
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=args.normalization, vp_stage=vp_stage
        ),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        vp_stage=vp_stage,
    )


def main():
    import inspect

    datasets.is_distributed = True
    defaults = {"tokenizer_type": "NullTokenizer"}
    if "args_defaults" in inspect.signature(pretrain).parameters:  # 0.17
        pretrain(datasets, provide_model, ModelType.encoder_or_decoder, forward, args_defaults=defaults)
        return
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(args_defaults=defaults)
    try:
        from megatron.training.argument_utils import gpt_config_from_args
    except ImportError:  # 0.18
        config = pretrain_cfg_container_from_args(args)
        pretrain(config, datasets, provide_model, ModelType.encoder_or_decoder, forward)
        return
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, datasets, ModelType.encoder_or_decoder, forward)


if __name__ == "__main__":
    main()
