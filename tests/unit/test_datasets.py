"""Which ranks read the data."""

from argparse import Namespace

import pytest

from air_moe_megatron.training import datasets


@pytest.mark.parametrize("tp_rank", (0, 1))
@pytest.mark.parametrize("needs_tokens", (False, True))
@pytest.mark.parametrize("flag", (None, "sft", "dataloader_inter_document_masking"))
def test_every_stage_reads_the_boundaries_of_packed_documents(monkeypatch, flag, needs_tokens, tp_rank):
    """``get_batch`` reads on a middle stage exactly where the data set is built."""
    monkeypatch.setattr(datasets.mpu, "get_tensor_model_parallel_rank", lambda: tp_rank)
    monkeypatch.setattr(datasets, "core_transformer_config_from_args", lambda args: None)
    monkeypatch.setattr(datasets, "needs_tokens", lambda config, vp_stage: (needs_tokens, False))
    args = Namespace(sft=False, dataloader_inter_document_masking=False)
    if flag is not None:
        setattr(args, flag, True)
    built = datasets.is_dataset_built_on_rank(args, None)
    assert built == (tp_rank == 0 and (needs_tokens or flag is not None))
