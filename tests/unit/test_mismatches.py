"""The doctor's comparison of our code with a Megatron: the installed one fits, and each kind of difference is found."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

from air_moe_megatron import compat
from air_moe_megatron.doctor import command as doctor
from air_moe_megatron.doctor import mismatches
from tests.processes import run

ROOT = Path(__file__).parents[2]
ROUTER = "megatron/core/transformer/moe/router.py"
DISPATCHER = "megatron/core/transformer/moe/token_dispatcher.py"
UTILS = "megatron/core/transformer/moe/moe_utils.py"
CONFIG = "megatron/core/transformer/transformer_config.py"
TRAINING = "megatron/training/training.py"


@pytest.fixture(scope="module")
def installed() -> Path:
    return Path(importlib.util.find_spec("megatron.core").submodule_search_locations[0]).parents[1]


DIFFERENCES = {
    "import": (UTILS, "def apply_random_logits(", "def apply_random_scores("),
    "argument": (
        UTILS,
        "    inp: torch.Tensor, weight: torch.Tensor,",
        "    other, inp: torch.Tensor, weight: torch.Tensor,",
    ),
    "keyword": (UTILS, "    dense_output: bool = False,", "    dense: bool = False,"),
    "inherited": (ROUTER, "def apply_input_jitter(", "def jitter("),
    "override": (
        ROUTER,
        '    def forward(self, input: torch.Tensor, padding_mask: Optional[torch.Tensor] = None):\n        """\n'
        "        Forward pass of the router.",
        '    def forward(self, input, padding_mask=None, input_ids=None):\n        """\n'
        "        Forward pass of the router.",
    ),
    "init": (
        ROUTER,
        '    ) -> None:\n        """Initialize the zero token dropping router.',
        '        layer=None,\n    ) -> None:\n        """Initialize the zero token dropping router.',
    ),
    "attribute": (DISPATCHER, "        self.ep_group = pg_collection.ep\n", "        self.group = pg_collection.ep\n"),
    "field": (CONFIG, "    moe_router_topk_scaling_factor: ", "    moe_router_scale: "),
    "wrapped": (TRAINING, "config, forward_backward_func, iteration=None", "config, schedule, iteration=None"),
    "adapted": ("megatron/training/initialize.py", "def _warmup_jit_function(", "def _warm_up("),
    "versioned": (UTILS, "    precomputed_indices: Optional[torch.Tensor] = None,\n", ""),
}
"""Kind of difference -> file of Megatron's, what stands there, and what stands there in a version that differs."""

FOUND = {
    "import": ("routers/air.py", "moe_utils.apply_random_logits does not exist"),
    "argument": ("routers/base.py", "moe_utils.router_gating_linear needs router_dtype"),
    "keyword": ("routers/base.py", "topk_routing_with_score_function takes no dense_output"),
    "inherited": ("routers/base.py", "TopKRouter has no apply_input_jitter"),
    "override": ("routers/base.py", "TopKRouter.forward takes input_ids too, which CompactRouter does not"),
    "init": ("routers/base.py", "TopKRouter.__init__ takes layer, which CompactRouter does not"),
    "attribute": ("layer/dispatcher.py", "MoETokenDispatcher has no ep_group"),
    "field": ("routers/base.py", "TransformerConfig has no moe_router_topk_scaling_factor"),
    "wrapped": ("step_hooks.py", "train_step, which we wrap, takes no forward_backward_func"),
    "adapted": ("cpu/adaptations.py", "_warmup_jit_function does not exist"),
    "versioned": ("compat.py", "precomputed_indices"),
}


@pytest.fixture(scope="module")
def different(installed, tmp_path_factory) -> Path:
    """A tree of links to the installed sources, with every difference in it."""
    folder = tmp_path_factory.mktemp("tree")

    def link(source, target):
        Path(target).symlink_to(source)

    def others(_, names):
        return [name for name in names if name == "__pycache__" or name.endswith(".so")]

    shutil.copytree(installed / "megatron", folder / "megatron", copy_function=link, ignore=others)
    for file, old, new in DIFFERENCES.values():
        text = (folder / file).read_text()
        assert text.count(old) >= 1, old
        (folder / file).unlink()
        (folder / file).write_text(text.replace(old, new, 1))
    return folder


@pytest.fixture(scope="module")
def found(different) -> list[tuple[str, str]]:
    return [(one.file, one.words) for one in mismatches.find_mismatches(different, "0.19.2")]


def test_the_installed_megatron_fits(installed):
    text, fits = mismatches.report(installed)
    assert fits and text.count("every name and signature that we use is there") == 2, text


@pytest.mark.parametrize("kind", FOUND)
def test_a_difference_is_found_and_placed(found, kind):
    file, words = FOUND[kind]
    assert [place for place, said in found if words in said and place == file], found


def test_what_our_code_does_without_on_a_version_counts_only_elsewhere(different):
    words = [one.words for one in mismatches.find_mismatches(different, "0.18.2")]
    assert words and not [one for one in words if "precomputed_indices" in one]


def test_layers_are_told_from_commands():
    files = mismatches.model_files()
    assert {"specs.py", "routers/air.py", "layer/dispatcher.py", "diagnostics/health.py"} <= files
    assert not {"training/run.py", "command/forward_step.py", "doctor/command.py", "inference/restore.py"} & files


def test_the_tables_beside_the_check_are_used():
    assert {file for _, file in compat.WRAPPED.values()} <= mismatches.sources().keys()
    every = "\n".join((mismatches.PACKAGE / file).read_text() for file in mismatches.sources() if file != "compat.py")
    every += (mismatches.PACKAGE / "compat.py").read_text().partition("def megatron_version")[2]
    for part in compat.VERSIONED:
        assert part.rpartition(".")[2] in every


def test_the_command_says_so_without_importing_the_tree(installed, tmp_path):
    command = [sys.executable, "-m", "air_moe_megatron.doctor", "--megatron"]
    said = run([*command, tmp_path], cwd=ROOT)
    assert said.returncode == 2 and "neither a Megatron-LM checkout" in said.stdout
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["--megatron", str(installed), "--num-layers", "2"])
