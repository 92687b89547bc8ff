"""What holds on each supported Megatron: `make test-versions`, or `python -m tests.versions 0.17.1 0.18.2`.

Each version is installed into a folder of its own, without its dependencies, over the torch of this environment, which
is not changed. Unit tests run on the wheel, the training on a patched copy of it. The table is printed at the end; the
exit code is 1 where something failed. The output of every step stays beside the installed version.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.datasets import write_indexed
from tests.processes import run

ROOT = Path(__file__).parents[1]
VERSIONS = ("0.17.1", "0.18.2", "0.19.*")
UNIT = (
    *("router", "layer", "specs", "config", "config_of_experts", "router_losses", "router_equals_topk", "router_flops"),
    *("vq", "exact", "product_key", "hierarchical", "hashing", "experts", "codebook", "index", "module_state"),
    *("boundaries", "health", "diagnostics", "bounds"),
)
"""Unit tests of what a model, its specs and its step boundary are made of."""
TESTS = {"unit": UNIT, "distributed": ("sharded_routing", "codebook_sync")}
"""Folder -> tests, of which the distributed ones run on two processes and more."""

_FIELDS = "a field that this version's config does not have, or refuses by itself"
_PER_TOKEN = {
    "seq-aux and per-token": "Megatron's seq_aux_loss with per-token loss has other gradients there; ours is 0.19's",
    "aux-seq-global and per-token": "the same",
    "per-token-loss-aux-seq-global": "the same",
}
LEFT_OUT = {
    "0.17": {
        **_PER_TOKEN,
        "paged-stash or interleaved-gates or grouped-weight or weight-shards": _FIELDS,
        "overlapped-gradients or capacity-of-a-rank": _FIELDS,
        "sqrtsoftplus or test_any_settings or test_bounds": "Megatron 0.17 has no score function sqrtsoftplus",
        "flag or test_an_unknown_choice or test_hash_takes or help_text or hash_vocabulary": (
            "the flags of our own commands, which need 0.19"
        ),
    },
    "0.18": {**_PER_TOKEN, "paged-stash or weight-shards": _FIELDS},
    "0.19": {},
}
"""Minor version -> tests that do not run on it, as pytest's -k, and why."""

LOSS = re.compile(r"iteration +(\d+)/ .*?lm loss: ([0-9.E+-]+) .*?grad norm: ([0-9.naif]+)")
MODEL = """--num-layers 2 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 64 --seq-length 16
  --max-position-embeddings 16 --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
  --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --num-experts 16
  --moe-ffn-hidden-size 8 --moe-router-topk 2 --moe-router-dtype fp32 --moe-router-load-balancing-type aux_loss
  --moe-aux-loss-coeff 0.01 --moe-token-dispatcher-type alltoall --tokenizer-type NullTokenizer --vocab-size 64
  --make-vocab-size-divisible-by 1 --micro-batch-size 2 --global-batch-size 8 --lr 1e-2 --lr-decay-style constant
  --log-interval 1 --eval-interval 1000 --eval-iters 1 --seed 7 --train-iters 8 --expert-model-parallel-size 2
  --moe-router-type air --moe-air-num-clusters 4 --moe-air-shortlist-size 8 --moe-granular-experts
  --moe-dispatch compact""".split()


def execute(folder: Path, name: str, command: list, first: Path | None = None) -> tuple[int, str]:
    """Run a command with a folder first on PYTHONPATH; exit code and output, which is kept in the folder."""
    path = os.pathsep.join(str(place) for place in (first, ROOT) if place)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ended = run(command, cwd=ROOT, env=environment, stderr=subprocess.STDOUT)
    (folder / f"{name}.log").write_text(ended.stdout)
    return ended.returncode, ended.stdout


def install(version: str, folder: Path) -> Path:
    """Install a wheel alone into ``folder/wheel``, once."""
    wheel = folder / "wheel"
    if not (wheel / "megatron").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", wheel]
        code, said = execute(folder, "install", [*pip, f"megatron-core=={version}"])
        if code:
            raise SystemExit(f"megatron-core {version} could not be installed:\n{said}")
    return wheel


def unit(folder: Path, wheel: Path, minor: str) -> tuple[bool, str]:
    """Run the unit and distributed tests on the wheel."""
    files = [f"tests/{kind}/test_{name}.py" for kind, names in TESTS.items() for name in names]
    left_out = " or ".join(f"({names})" for names in LEFT_OUT[minor])
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not gpu and not slow and not long",
        *files,
    ]
    code, said = execute(folder, "unit", [*command, *(["-k", f"not ({left_out})"] if left_out else [])], wheel)
    return not code, said.strip().splitlines()[-1].partition(" in ")[0]


def patched(folder: Path, wheel: Path) -> tuple[bool, str, Path]:
    """Apply the patch to a copy, revert it, compare all bytes, and apply it again."""
    copy = folder / "patched"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(wheel, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = {path: path.read_bytes() for path in copy.rglob("*.py")}
    command = [sys.executable, "-m", "air_moe_megatron.patch"]
    codes = [execute(folder, f"patch-{action}", [*command, action, copy])[0] for action in ("apply", "revert")]
    undone = before == {path: path.read_bytes() for path in copy.rglob("*.py")}
    codes.append(execute(folder, "patch-apply", [*command, "apply", copy])[0])
    good = codes == [0, 0, 0] and undone
    return good, "applied, reverted to the byte" if good else f"exit codes {codes}, undone: {undone}", copy


def train(folder: Path, first: Path, name: str, entry: list[str], data: list) -> tuple[bool, str]:
    """Train eight steps on two CPU ranks; the first and the last loss."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    code, said = execute(folder, name, [*launch, *entry, *MODEL, *data], first)
    steps = LOSS.findall(said)
    if code or len(steps) != 8 or not float(steps[-1][1]) < float(steps[0][1]):
        return False, f"exit code {code} after {len(steps)} steps"
    return True, f"{float(steps[0][1]):.4f} -> {float(steps[-1][1]):.4f}"


def refused(folder: Path, wheel: Path) -> tuple[bool, str]:
    """Our own entry, on a version that it does not take, ends with one line that says so."""
    command = [sys.executable, "-m", "air_moe_megatron.pretrain", "--cpu", *MODEL]
    code, said = execute(folder, "entry", command, wheel)
    good = code != 0 and "is not supported" in said and "Traceback" not in said
    return good, "refused, with the reason" if good else f"exit code {code}"


def write_data(folder: Path) -> list:
    """Documents that count modulo 64."""
    documents = [[token % 64 for token in range(start, start + 61)] for start in range(200)]
    prefix = write_indexed(folder / "count", documents)
    return ["--data-path", prefix, "--split", "8,1,1", "--data-cache-path", folder / "cache"]


def main() -> None:
    """Test every version and print the table."""
    from air_moe_megatron.cpu import REQUIRED_FLAGS
    from air_moe_megatron.patch import version_of

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument("--out", type=Path, default=ROOT / "out/versions")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data, rows, all_good = write_data(args.out), [], True
    for version in args.versions:
        folder = args.out / version.replace(".*", "")
        folder.mkdir(exist_ok=True)
        wheel = install(version, folder)
        found = version_of(wheel)
        minor = ".".join(found.split(".")[:2])
        outcomes = [unit(folder, wheel, minor)]
        *patch_outcome, copy = patched(folder, wheel)
        script = ["-m", "air_moe_megatron.cpu", "tests/megatron/plain_gpt.py", *REQUIRED_FLAGS]
        outcomes += [tuple(patch_outcome), train(folder, copy, "training", script, data)]
        if minor == "0.19":
            outcomes.append(train(folder, wheel, "entry", ["-m", "air_moe_megatron.pretrain", "--cpu"], data))
        else:
            outcomes.append(refused(folder, wheel))
        all_good &= all(good for good, _ in outcomes)
        rows.append([found, *(words if good else f"FAILED: {words}" for good, words in outcomes)])
        sys.stderr.write(" | ".join(rows[-1]) + "\n")
    columns = (
        "megatron-core",
        "unit and distributed tests",
        "patch",
        "its own script, patched: loss",
        "our entry: loss",
    )
    table = [columns, ["---"] * len(columns), *rows]
    sys.stdout.write("".join(f"| {' | '.join(row)} |\n" for row in table))
    sys.exit(not all_good)


if __name__ == "__main__":
    main()
