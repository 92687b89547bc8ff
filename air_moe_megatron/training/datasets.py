"""The training, validation and test data, as ``pretrain_gpt.py`` of Megatron-LM builds them."""

import argparse
import dataclasses
import json
from functools import partial
from typing import Any

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, print_rank_0
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.datasets.fim_dataset import GPTFIMDataset, GPTFIMDatasetConfig
from megatron.training.datasets.sft_dataset import SFTDataset
from megatron.training.utils import get_blend_and_blend_per_split

from air_moe_megatron.command.arguments import is_packed
from air_moe_megatron.command.forward_step import needs_tokens


def dataset_config_from_args(args: argparse.Namespace) -> GPTDatasetConfig:
    """Build the data set configuration; with ``--fim-data`` the one for fill-in-the-middle data."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences_per_dataset = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path) as file:
            sequences_per_dataset = json.load(file)

    config_class, extra = GPTDatasetConfig, {}
    if args.fim_data:
        config_class = GPTFIMDatasetConfig
        tokens = ("prefix", "middle", "suffix", "pad", "eod")
        extra = {"fim_extra_tokens": {name: getattr(args, f"fim_{name}_token") for name in tokens}}
    same_names = [field.name for field in dataclasses.fields(config_class) if hasattr(args, field.name)]
    return config_class(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        path_to_cache=args.data_cache_path,
        tokenizer=build_tokenizer(args),
        create_attention_mask=args.create_attention_mask_in_dataloader,
        fast_cache_load=args.dataloader_fast_cache_load,
        sequences_per_dataset=sequences_per_dataset,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
        inter_document_masking=args.dataloader_inter_document_masking,
        **extra,
        **{name: getattr(args, name) for name in same_names},
    )


def is_dataset_built_on_rank(args: argparse.Namespace, vp_stage: int | None) -> bool:
    """Say whether this rank reads the data set itself.

    Tensor-parallel rank 0 does, in the stages that need tokens. Every stage needs the boundaries of packed sequences.
    """
    if mpu.get_tensor_model_parallel_rank() != 0:
        return False
    return is_packed(args) or needs_tokens(core_transformer_config_from_args(args), vp_stage)[0]


def train_valid_test_datasets_provider(
    train_valid_test_num_samples: list[int | None], vp_stage: int | None = None
) -> list[Any]:
    """Build the three data sets.

    Args:
        train_valid_test_num_samples: samples wanted of each split.
        vp_stage: index of the virtual pipeline stage; None without virtual stages.
    Returns:
        The training, validation and test data set; None for a split without data or on a rank that reads none.
    """
    args = get_args()
    if args.sft:
        dataset_class = SFTDataset
    elif args.mock_data:
        dataset_class = MockGPTDataset
    elif args.fim_data:
        dataset_class = GPTFIMDataset
    else:
        dataset_class = GPTDataset
    print_rank_0("> building train, validation, and test datasets for GPT ...")
    datasets = BlendedMegatronDatasetBuilder(
        dataset_class,
        train_valid_test_num_samples,
        partial(is_dataset_built_on_rank, args, vp_stage),
        dataset_config_from_args(args),
    ).build()
    print_rank_0("> finished creating GPT datasets ...")
    return datasets


train_valid_test_datasets_provider.is_distributed = True
"""Read by Megatron: every rank calls the provider, not only tensor-parallel rank 0."""
