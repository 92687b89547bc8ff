"""Version checks, and what other versions of Megatron are given."""

import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from air_moe_megatron import compat
from tests.processes import run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("version", ["0.16.1", "0.20.0", "1.0"])
def test_versions_that_are_not_tested_are_refused(monkeypatch, version):
    monkeypatch.setattr(compat, "megatron_version", lambda: Version(version))
    with pytest.raises(ImportError, match=rf"megatron-core {version} is not supported: .* needs >= 0.17, < 0.20"):
        compat.require_supported_megatron()


@pytest.mark.parametrize("version", ["0.17.1", "0.18.2"])
def test_our_commands_name_the_way_on_versions_that_they_do_not_take(monkeypatch, version):
    monkeypatch.setattr(compat, "megatron_version", lambda: Version(version))
    compat.require_supported_megatron()
    with pytest.raises(ImportError, match=rf"megatron-core {version} is not supported: .*GPTModelConfig.*patch apply"):
        compat.require_entry_megatron()


@pytest.mark.parametrize(
    "settings", [{}, {"score_function": "sigmoid", "scaling_factor": 2.5}], ids=["softmax", "sigmoid"]
)
def test_probs_of_selected_experts_are_the_same_where_megatron_takes_no_selection(monkeypatch, settings):
    scores = (
        torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float().requires_grad_()
    )
    expected = compat.probs_of_selected(scores, **settings)
    (gradient,) = torch.autograd.grad((expected * torch.arange(7)).sum(), scores)
    monkeypatch.setattr(compat, "megatron_version", lambda: Version("0.18.2"))
    found = compat.probs_of_selected(scores, **settings)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad((found * torch.arange(7)).sum(), scores)[0], gradient)


def test_an_unsupported_megatron_ends_a_command_in_one_line():
    code = (
        "import sys; from packaging.version import Version; from air_moe_megatron import compat, pretrain\n"
        "compat.megatron_version = lambda: Version('0.18.2')\n"
        "sys.argv = ['pretrain', '--cpu']; pretrain.main()\n"
    )
    said = run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT)
    assert said.returncode != 0 and "Traceback" not in said.stderr
    assert "megatron-core 0.18.2 is not supported" in said.stderr.strip().splitlines()[-1]
