"""A folder in which a run cannot save, and an optimizer that cannot resume, are refused before the start."""

import argparse

import pytest

from air_moe_megatron.routers.missing_state import MissingState
from tests.saved import BF16, EXPERTS, FFN, HIDDEN, LAYERS


def test_a_folder_that_cannot_be_written_is_refused(check, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--save '.*/file/run' cannot be written: Not a directory in .*, on rank 0"):
        check(save=tmp_path / "file" / "run")
    assert check(save=tmp_path / "a" / "b") is MissingState.NOTHING
    assert not (tmp_path / "a").exists()
    assert check(save=tmp_path / "file" / "run", skip_train=True) is MissingState.NOTHING
    with pytest.raises(ValueError, match=r"--tensorboard-dir '.*/file' cannot be written: Not a directory in .*/file'"):
        check(tensorboard_dir=str(tmp_path / "file"))
    assert check(tensorboard_dir=str(tmp_path / "a")) is MissingState.NOTHING
    assert check(tensorboard_dir=str(tmp_path / "file"), world_size=2) is MissingState.NOTHING  # the last rank writes


def test_a_file_system_without_room_is_refused(check, tmp_path):
    huge = {"num_experts": 2**30, "moe_ffn_hidden_size": 2**20}
    needed = r"\d{7,}\.\d GiB: free some"
    with pytest.raises(ValueError, match=rf"--save '.*' has \d+\.\d GiB free, and .* takes at least {needed}"):
        check(save=tmp_path, **huge)
    assert check(**huge) is MissingState.NOTHING


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
    assert check(**distributed) is MissingState.NOTHING
    assert check(save=tmp_path, no_save_optim=True, **distributed) is MissingState.NOTHING
    folder = save(is_legacy=is_legacy, **distributed)
    with pytest.raises(ValueError, match="without Transformer Engine or Apex .* or add --no-load-optim"):
        check(load=folder, **distributed)
    assert check(load=folder, no_load_optim=True, **distributed) is MissingState.NOTHING
    monkeypatch.setattr(saving, "HAVE_APEX_OR_TE", True)
    assert check(load=folder, save=tmp_path, **distributed) is MissingState.NOTHING
    with pytest.raises(ValueError, match="another kind of optimizer: --use-distributed-optimizer must be given"):
        check(load=folder)


def test_a_run_that_would_overwrite_another_one_says_so(save, check, tmp_path, caplog):
    folder = save()
    check(load=folder, save=folder)
    check(save=tmp_path / "new")
    check(save=folder, skip_train=True)
    assert not caplog.records
    check(save=folder)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"--save '{folder}' holds 'iter_0000002' of a run that is not loaded.")
