"""Train the runs of a study and keep what came of each: `python -m benchmarks.quality.study CONFIG.toml`.

A run is one call of Megatron's training through `air_moe_megatron.pretrain`; all of its flags stand in its result, one
JSON line. A run whose result exists is not repeated, and a long run goes on from its last checkpoint: an interrupted
study goes on where it was.
"""

import argparse
import fnmatch
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from benchmarks import ROOT
from benchmarks.arguments import not_negative, positive, refused

logger = logging.getLogger(__name__)

_CPU_FLAGS = {"cpu": True}
# By default glibc returns the memory of large tensors to the kernel and gets it again page by page. With these values
# it keeps the memory: a step of an exact router over 65,536 experts takes 3.5 s instead of 8.2 (docs/log.md). No result
# depends on it.
CPU_ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**28)}
# Megatron's own layers, as Transformer Engine and Apex may be missing.
_GPU_FLAGS = {
    "bf16": True,
    "transformer-impl": "local",
    "no-gradient-accumulation-fusion": True,
    "no-masked-softmax-fusion": True,
    "no-persist-layer-norm": True,
    "no-rope-fusion": True,
    "no-bias-dropout-fusion": True,
}
_BLOCK = ("experts", "shapes", "variants", "seeds", "corpus", "vocabulary", "flags")
_RULES = {
    "corpus": ("a name of letters, digits, '.', '_' and '-'", lambda value: _is_name(value)),
    "vocabulary": ("a whole number of at least 2", lambda value: _is_integer(value, 2)),
    "seeds": ("a list of whole numbers from 0", lambda value: _is_list(value, lambda seed: _is_integer(seed, 0))),
    "experts": ("a list of whole numbers from 1", lambda value: _is_list(value, lambda size: _is_integer(size, 1))),
    "shapes": (
        "a list of pairs [top-k, rows of an expert] of whole numbers from 1",
        lambda value: _is_list(
            value, lambda pair: _is_list(pair, lambda size: _is_integer(size, 1)) and len(pair) == 2
        ),
    ),
    "variants": ("a list of names of variants", lambda value: _is_list(value, lambda name: isinstance(name, str))),
    "flags": ("a table of numbers, texts and booleans", lambda value: _is_flags(value)),
}
"""Entry of a study -> the rule for its value in words, and its check."""
BYTES = 257
"""The vocabulary of a corpus in bytes: all of them, and the end of a document."""
_ROW_START = '{"key": "'
"""How every row of a file of results begins."""
_LOSS_POINTS = 50  # points of the training loss in a result; each is a mean over its share of the steps


@dataclass(frozen=True)
class Run:
    """One training run."""

    variant: str
    experts: int
    topk: int
    ffn: int
    seed: int
    corpus: str
    vocabulary: int
    flags: dict  # Megatron's and ours, without leading dashes; True for a flag that takes no value

    @property
    def key(self) -> str:
        """A key of the run, equal for equal flags and data."""
        given = json.dumps([self.corpus, self.vocabulary, self.flags], sort_keys=True)
        return hashlib.sha256(given.encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        of_data = f"seed={self.seed} {self.corpus} {self.flags['train-iters']} steps"
        return f"{self.variant} E={self.experts} K={self.topk} F={self.ffn} {of_data}"

    @property
    def layers(self) -> int:
        """Number of its layers."""
        return self.flags["num-layers"]

    @property
    def prepared(self) -> str:
        """Name of the folder of its data sets."""
        return f"{self.corpus}-{self.vocabulary}"


def load_runs(config: dict) -> list[Run]:
    """The runs of a study, in the order in which they are made: all of one seed before the next.

    Args:
        config: a parsed study file; benchmarks/quality/README.md documents its entries.
    Raises:
        ValueError: naming an entry that is missing, unknown or invalid.
    """
    for entry in ("corpus", "vocabulary", "seeds", "flags", "variants", "runs"):
        if entry not in config:
            raise ValueError(f"{entry} is missing in the study's config")
    if not isinstance(config["variants"], dict):
        raise ValueError(f"variants ({config['variants']!r}) must be a table of variants")
    for name, flags in config["variants"].items():
        _check(f"variants.{name}", "flags", flags)
    for name in ("corpus", "vocabulary", "seeds", "flags"):
        _check(name, name, config[name])
    if not _is_list(config["runs"], lambda block: isinstance(block, dict)):
        raise ValueError(f"runs ({config['runs']!r}) must be a list of blocks, [[runs]]")
    runs = {}
    for block in config["runs"]:
        unknown = [name for name in block if name not in _BLOCK]
        if unknown:
            raise ValueError(f"runs: {unknown[0]!r} is not among the entries of a block: {', '.join(_BLOCK)}")
        for name in ("experts", "shapes", "variants"):
            if name not in block:
                raise ValueError(f"runs: {name} is missing in a block")
        for name, value in block.items():
            _check(f"runs: {name}", name, value)
        unknown = [name for name in block["variants"] if name not in config["variants"]]
        if unknown:
            raise ValueError(
                f"variants ({unknown[0]!r}) is not among those of the config: {', '.join(config['variants'])}"
            )
        seeds, corpus, vocabulary = (block.get(name, config[name]) for name in ("seeds", "corpus", "vocabulary"))
        for seed, experts, shape, variant in itertools.product(
            seeds, block["experts"], block["shapes"], block["variants"]
        ):
            topk, ffn = shape
            flags = {
                **config["flags"],
                **block.get("flags", {}),
                "num-experts": experts,
                "moe-router-topk": topk,
                "moe-ffn-hidden-size": ffn,
                "seed": seed,
                **config["variants"][variant],
            }
            flags = {name: value for name, value in flags.items() if value is not False}
            run = Run(variant, experts, topk, ffn, seed, corpus, vocabulary, flags)
            runs.setdefault(run.key, run)
    return list(runs.values())


def _check(field: str, entry: str, value: object) -> None:
    rule, holds = _RULES[entry]
    if not holds(value):
        raise ValueError(f"{field} ({value!r}) must be {rule}")


def _is_name(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", value) is not None


def _is_integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_list(value: object, holds: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(holds, value))


def _is_flags(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(item, (bool, int, float, str)) for item in value.values())


def start_of(run: Run, folder: Path, checkpoint_interval: int) -> int:
    """The iteration from which a run continues: that of its checkpoint in ``folder``, 0 if it has none."""
    tracker = folder / "checkpoint/latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if checkpoint_interval and tracker.is_file() else 0


def command(
    run: Run,
    data: Path,
    folder: Path,
    eval_iters: int,
    on_gpu: bool,
    checkpoint_interval: int = 0,
    keeps_checkpoints: bool = False,
) -> list[str]:
    """The command line that starts or continues a run.

    Args:
        data: folder of the data sets.
        folder: folder of the run.
        eval_iters: iterations over the whole test split, for a study without "eval-iters".
        on_gpu: whether it runs on a GPU, in bf16.
        checkpoint_interval: steps between two checkpoints. With 0, or in a run without more steps, none are made.
        keeps_checkpoints: whether all checkpoints are kept, instead of the last one.
    """
    start, num_steps = start_of(run, folder, checkpoint_interval), run.flags["train-iters"]
    saving = {}
    if 0 < checkpoint_interval < num_steps:
        # Megatron keeps the last checkpoint, and those at multiples of the interval to retain.
        retained = checkpoint_interval * (1 if keeps_checkpoints else math.ceil(num_steps / checkpoint_interval))
        saving = {"save": folder / "checkpoint", "save-interval": checkpoint_interval, "save-retain-interval": retained}
    flags = {
        **(_GPU_FLAGS if on_gpu else _CPU_FLAGS),
        "eval-iters": eval_iters,
        **run.flags,
        "tokenizer-type": "NullTokenizer",
        "vocab-size": run.vocabulary,
        "make-vocab-size-divisible-by": 1,
        "train-data-path": data / "train",
        "valid-data-path": data / "valid",
        "test-data-path": data / "test",
        "data-cache-path": folder / "cache",
        "tensorboard-dir": folder / "tensorboard" / str(start),
        **saving,
        **({"load": folder / "checkpoint"} if start else {}),
    }
    words = [
        word
        for name, value in flags.items()
        for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"] if on_gpu else []
    return [sys.executable, "-W", "ignore", *launcher, "-m", "air_moe_megatron.pretrain", *words]


class Study:
    """What all runs of a study share: data, folders, and the file of results.

    Args:
        runs: runs to make.
        data_dir: folder of the corpora.
        out: folder for logs, TensorBoard files and, under "data", the corpora's data sets.
        results: file of JSON lines, which may already hold results.
        threads: threads of a run on a CPU.
        checkpoint_interval: steps between two checkpoints of a longer run.
        keeps_checkpoints: whether all checkpoints are kept, even after the end of the run.
    """

    def __init__(
        self,
        runs: list[Run],
        data_dir: Path,
        out: Path,
        results: Path,
        threads: int,
        checkpoint_interval: int = 0,
        keeps_checkpoints: bool = False,
    ) -> None:
        import torch

        self.checkpoint_interval, self.keeps_checkpoints = checkpoint_interval, keeps_checkpoints
        self.runs, self.data_dir, self.out, self.results, self.threads = runs, data_dir, out, results, threads
        self.on_gpu = torch.cuda.is_available()
        self.precision = "bf16" if self.on_gpu else "fp32"
        self._lock = threading.Lock()

    def pending(self) -> list[Run]:
        """The runs that have no result of this precision yet."""
        done = self.done()
        return [run for run in self.runs if run.key not in done]

    def done(self) -> dict[str, dict]:
        """The results of this precision, by the keys of their runs."""
        return {row["key"]: row for row in read_results(self.results) if row["precision"] == self.precision}

    def prepare(self, pending: list[Run]) -> dict[str, "Meta"]:  # noqa: F821
        """Prepare the data sets of the pending runs, and return their sizes by ``Run.prepared``."""
        from benchmarks.quality.data import prepare

        corpora = {run.prepared: (run.corpus, run.vocabulary) for run in pending}
        data = self.out / "data"
        return {name: prepare(*corpus, self.data_dir, data / name) for name, corpus in corpora.items()}

    def make(self, pending: list[Run], metas: dict[str, "Meta"], jobs: int) -> list[Run]:  # noqa: F821
        """Make the pending runs on their prepared data, ``jobs`` at a time; returns those that failed."""
        failed = []
        logger.info("%d runs, %d of them done before", len(self.runs), len(self.runs) - len(pending))
        with ThreadPoolExecutor(jobs) as pool, logging_redirect_tqdm():
            futures = {pool.submit(self._make_one, run, metas[run.prepared]): run for run in pending}
            try:
                for future in tqdm(as_completed(futures), total=len(pending), unit="run"):
                    run, row = futures[future], future.result()
                    if row is None:
                        failed.append(run)
                        outcome = f"FAILED, see {self._folder(run) / 'log.txt'}"
                    else:
                        outcome = f"{describe(row)}, {row['seconds']:.0f} s"
                    logger.info("%s: %s", run.name, outcome)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return failed

    def _folder(self, run):
        return self.out / "runs" / run.key

    def _make_one(self, run, meta):
        from benchmarks.quality import curves

        folder = self._folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        per_step = run.flags["global-batch-size"]
        samples = (meta.tokens["test"] - 1) // run.flags["seq-length"]
        eval_iters = max(1, samples // per_step)
        iteration = start_of(run, folder, self.checkpoint_interval)
        curves.begin(folder / "tensorboard", iteration)
        data = self.out / "data" / run.prepared
        saving = self.checkpoint_interval, self.keeps_checkpoints
        line = command(run, data, folder, eval_iters, self.on_gpu, *saving)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if not self.on_gpu:
            environment |= {"OMP_NUM_THREADS": str(self.threads), **CPU_ENVIRONMENT}
        start = time.perf_counter()
        with (folder / "log.txt").open("a" if iteration else "w") as log:
            log.write(" ".join(line) + "\n")
            log.flush()
            code = subprocess.run(line, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
        if code:
            return None
        row = self._result(run, meta, folder, time.perf_counter() - start)
        with self._lock:
            append_result(self.results, row)
        if not self.keeps_checkpoints:
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        return row

    def _result(self, run, meta, folder, seconds):
        from benchmarks.quality import curves
        from benchmarks.quality.flops import flops_per_token

        scalars = curves.read(folder / "tensorboard")
        # The evaluations during training are followed by those of the validation and test split, under the same name.
        *valid_losses, (_, valid_loss), (_, test_loss) = scalars["lm loss validation"]
        row = {
            "key": run.key,
            **{name: getattr(run, name) for name in ("variant", "experts", "topk", "ffn", "seed", "corpus")},
            "vocabulary": run.vocabulary,
            "valid_loss": valid_loss,
            "test_loss": test_loss,
            "bits_per_byte": test_loss * meta.tokens["test"] / meta.bytes["test"] / math.log(2),
        }
        if meta.words is not None:
            row["word_perplexity"] = math.exp(test_loss * meta.tokens["test"] / meta.words["test"])
        return row | {
            "train_losses": curves.thin(scalars["lm loss"], _LOSS_POINTS),
            "valid_losses": valid_losses,
            "health": {name.removeprefix("air/"): values for name, values in scalars.items() if name.count("/") == 1},
            "flops_per_token": flops_per_token(run.flags, run.vocabulary, self.on_gpu),
            "tokens": run.flags["train-iters"] * run.flags["global-batch-size"] * run.flags["seq-length"],
            "seconds": round(seconds, 1),
            "precision": self.precision,
            "flags": run.flags,
            **origin(self.on_gpu),
        }


def read_results(*files: Path) -> list[dict]:
    """The rows of files of JSON lines; a file that does not exist has none.

    A last line that was cut short when a study was killed is left out, with a warning.

    Raises:
        ValueError: naming file and line, if a line is no row, or a run has two rows of one precision.
    """
    rows, first_places = [], {}
    for path in files:
        text = path.read_text() if path.is_file() else ""
        cut = _cut_line(text)
        if cut:
            logger.warning("%s: the last line was cut short when a study was killed, and is left out", path)
        for number, line in enumerate(text.removesuffix(cut).splitlines(), 1):
            place = f"{path}, line {number}"
            row = _row(line, place)
            run = row["key"], row["precision"]
            if run in first_places:
                raise ValueError(
                    f"{place}: key ({run[0]!r}) occurs twice in precision {run[1]}, before in {first_places[run]}: a "
                    "run has one row; give each file once, and remove one of the two lines"
                )
            first_places[run] = place
            rows.append(row)
    return rows


def _row(line: str, place: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not a result ({error}); remove the line") from None
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("key", "precision")):
        raise ValueError(f"{place}: not a result (key and precision must be texts); remove the line")
    return row


def _cut_line(text: str) -> str:
    """The last line of a file of results if a killed study left it incomplete, otherwise "".

    It has no end, is no JSON, and begins as a row does. Other text is no remainder of a row, and is never replaced.
    """
    last = text.rpartition("\n")[2]
    if not last.startswith(_ROW_START) and not _ROW_START.startswith(last):
        return ""
    try:
        json.loads(last)
    except json.JSONDecodeError:
        return last
    return ""


def append_result(path: Path, row: dict) -> None:
    """Append a row to a file of results. It takes the place of a last line that a killed study cut short."""
    text = path.read_text() if path.is_file() else ""
    cut = _cut_line(text)
    if cut:
        os.truncate(path, path.stat().st_size - len(cut.encode()))
    lacks_end = not cut and text and not text.endswith("\n")
    with path.open("a") as file:
        file.write(("\n" if lacks_end else "") + json.dumps(row) + "\n")


def describe(row: dict) -> str:
    """The figure by which a result is judged, in words."""
    if "word_perplexity" in row:
        return f"{row['word_perplexity']:.1f} per word"
    return f"{row['bits_per_byte']:.4f} bits per byte"


def origin(on_gpu: bool) -> dict[str, str]:
    """Fields of every result: commit, versions, device."""
    import torch

    from benchmarks.measure import environment

    given = environment(torch.device("cuda", 0) if on_gpu else torch.device("cpu"))
    return {name: given[name] for name in ("device", "torch", "megatron_core", "commit")}


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare the data, make the missing runs, and print where the results are."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("benchmarks").setLevel(logging.INFO)
    logger.setLevel(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("config", type=Path, help="TOML file of the study")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data/stdlib", help="where the corpus is")
    parser.add_argument("--out", type=Path, default=ROOT / "out/quality", help="for data sets, logs, TensorBoard files")
    parser.add_argument("--results", type=Path, help="file of JSON lines (OUT/CONFIG.jsonl where not given)")
    parser.add_argument("--jobs", type=positive, default=None, help="runs at a time (cores over a run's threads)")
    parser.add_argument("--threads", type=positive, default=1, help="of a run on a CPU")
    parser.add_argument("--checkpoint-interval", type=not_negative, default=600, help="steps; 0 makes no checkpoints")
    parser.add_argument("--keep-checkpoints", action="store_true", help="keep them all, for copying.py")
    parser.add_argument("--only", default="*", help="pattern of the names of runs, such as 'air*E=16384*'")
    parser.add_argument("--list", action="store_true", help="list the runs, done or not, and make none")
    args = parser.parse_args(argv)

    try:
        runs = load_runs(tomllib.loads(args.config.read_text()))
    except (OSError, ValueError) as error:
        parser.error(f"{args.config}: {error}")
    runs = [run for run in runs if fnmatch.fnmatch(run.name, args.only)]
    if not runs:
        parser.error(f"--only ({args.only!r}) must match the name of a run of {args.config}, as --list shows it")
    results = args.results or args.out / f"{args.config.stem}.jsonl"
    saving = args.checkpoint_interval, args.keep_checkpoints
    study = Study(runs, args.data_dir, args.out, results, args.threads, *saving)
    try:
        if args.list:
            done = study.done()
            for run in runs:
                result = describe(done[run.key]) if run.key in done else "to be made"
                sys.stdout.write(f"{run.key}  {run.name}: {result}\n")
            return
        pending = study.pending()
    except ValueError as error:
        sys.exit(str(error))
    results.parent.mkdir(parents=True, exist_ok=True)
    jobs = args.jobs or (1 if study.on_gpu else max(1, len(os.sched_getaffinity(0)) // args.threads))
    with refused(parser):
        metas = study.prepare(pending)
    failed = study.make(pending, metas, jobs)
    logger.info("results: %s", results)
    if failed:
        sys.exit(f"{len(failed)} runs failed: {', '.join(run.name for run in failed)}")


if __name__ == "__main__":
    main()
