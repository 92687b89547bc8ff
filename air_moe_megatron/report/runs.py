"""Read runs: check a folder's ``air_diagnostics.jsonl`` and ``air_codebook.json``, and drop superseded lines.

``diagnostics/files.py`` writes these files. It loads Megatron, which a report does not need, so their names stand here
again; a test compares them.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import pandas

FORMAT = 1
LINES, SNAPSHOT = "air_diagnostics.jsonl", "air_codebook.json"
_HEADER_START = '{"kind": "run"'
"""How the first line of every start begins."""
MOST_RUNS = 7
"""How many runs colors can tell apart."""

# Required numbers in a line of each kind.
_NUMBERS = {
    "run": ("format", "iteration"),
    "step": ("iteration", "tokens"),
    "diagnostics": ("iteration", "tokens"),
}
_BINS = ("load_bins", "max_bins")
_STEPS = ("iteration", "tokens", "time", "step_seconds", "loss", "grad_norm")
METRICS = (
    *("mass_recall", "paper_bound", "mass_bound", "certified", "topk_recall", "quantization_error"),
    *("codeword_entropy", "idle_codewords", "list_overlap", "experts_listed", "experts_used"),
    *("imbalance_factor", "rank_imbalance", "routing_seconds"),
)
"""Metrics of a layer, as the file names them."""


@dataclass(frozen=True)
class Resume:
    """A restart from a checkpoint."""

    iteration: int
    tokens: float
    num_superseded: int  # lines of the earlier run that are left out
    changed: dict[str, tuple[Any, Any]]  # argument -> before and after


@dataclass(frozen=True)
class Codebook:
    """The newest snapshot of a layer's codebook; C codewords.

    Attributes:
        x, y: [C] first two principal components.
        load: [C] tokens of the measured step.
        recall: [C] top-k recall of sampled tokens; NaN if none was seen.
        tokens: for each codeword [token id, count], the most frequent first; None if ids were not known.
    """

    x: numpy.ndarray
    y: numpy.ndarray
    load: numpy.ndarray
    recall: numpy.ndarray
    tokens: list[list[list[int]]] | None


@dataclass(frozen=True)
class Run:
    """The contents of a run's files, without superseded lines.

    Attributes:
        header: the newest line of kind "run".
        steps: a row per logged step: iteration, tokens, step_seconds, loss, grad_norm, and seconds, which is the
            training time so far without pauses, evaluation and saving.
        totals: a row per diagnostics line: iteration, tokens, routing_seconds, routing_share.
        layers: a row per layer and diagnostics line: iteration, tokens, layer, router, the metrics, and derived ones:
            unused, unlisted, idle, drift.
        bins: layer -> name -> [records, bins] fp32, with the tokens of the records under "tokens".
        codebooks: layer -> its codebook, of the layers that have the router air in the newest header.
        codebook_iteration: the step of the codebooks; None if there are none.
        notes: remarks on the files for the reader of the page.
    """

    name: str
    folder: Path
    header: dict[str, Any]
    steps: pandas.DataFrame
    totals: pandas.DataFrame
    layers: pandas.DataFrame
    bins: dict[int, dict[str, numpy.ndarray]]
    resumes: tuple[Resume, ...]
    codebooks: dict[int, Codebook]
    codebook_iteration: int | None
    notes: tuple[str, ...]

    @property
    def sizes(self) -> dict[int, dict[str, Any]]:
        """Layer number -> its entry in the newest header."""
        return {layer["layer"]: layer for layer in self.header["layers"]}

    @property
    def router_type(self) -> str:
        """The run's ``--moe-router-type``: the router of all layers but the first ones of ``--moe-num-hash-layers``."""
        return self.argument("moe_router_type", "")

    @property
    def routers(self) -> list[str]:
        """Types of the layers' routers, in the order of the layers."""
        return list(dict.fromkeys(layer["router"] for layer in self.header["layers"]))

    def argument(self, name: str, default: Any = None) -> Any:
        """The value of a flag, by its name with underscores."""
        return self.header["arguments"].get(name, default)

    def tokens_at(self, iteration: int) -> float:
        """Tokens consumed up to an iteration, interpolated between logged ones; none up to iteration 0."""
        known = pandas.concat([self.steps, self.totals])[["iteration", "tokens"]].sort_values("iteration")
        return float(numpy.interp(iteration, [0, *known["iteration"]], [0, *known["tokens"]]))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs of several folders, named by the parts in which their paths differ.

    Raises:
        ValueError: if there are more than ``MOST_RUNS``, a folder is given twice, or a file is damaged.
        OSError: if a folder has no file of a run.
    """
    if len(folders) > MOST_RUNS:
        raise ValueError(f"{len(folders)} runs are given; colors tell {MOST_RUNS} apart, so give at most so many")
    resolved = [folder.resolve() for folder in folders]
    for index, folder in enumerate(resolved):
        if folder in resolved[:index]:
            raise ValueError(f"{folders[index]} is given twice")
    return [read_run(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]


def names_of(folders: Sequence[Path]) -> list[str]:
    """Names of runs: the parts of their paths in which they differ.

    Example: out/a/checkpoint and out/b/checkpoint are "a" and "b"; one folder keeps its path.
    """
    if len(folders) == 1:
        return [str(folders[0])]
    parts = [folder.resolve().parts for folder in folders]
    shared_end = os.path.commonprefix([part[::-1] for part in parts])
    shared_start = os.path.commonprefix(parts)
    names = [part[len(shared_start) : len(part) - len(shared_end)] for part in parts]
    if all(names):
        return ["/".join(name) for name in names]
    return [str(folder) for folder in folders]


def read_run(folder: Path, name: str) -> Run:
    """Read a run.

    Incomplete lines, left by killed runs, are skipped with a note if they are the last or a resumed run follows them.
    Codebooks are skipped with a note if they are those of an earlier run in the folder.

    Raises:
        ValueError: naming the file and the invalid line.
        OSError: if there is no file.
    """
    path = folder / LINES
    if not path.is_file():
        below = sorted(folder.glob(f"*/{LINES}"))
        hint = f"; {below[0].parent} has it" if below else f"; a run with diagnostics writes {LINES} there"
        raise FileNotFoundError(f"{path} does not exist{hint}")
    records, notes = _records(path)
    kept, headers, resumes = _superseded(records)
    if not any(kept.values()):
        raise ValueError(f"{path} has no metrics yet: the run has not reached its first log interval")
    header = headers[-1]
    steps = pandas.DataFrame(kept["step"]).reindex(columns=_STEPS).astype(float)
    counts = steps["iteration"].diff().fillna(steps["iteration"] - headers[0]["iteration"])
    steps["seconds"] = (steps["step_seconds"] * counts).cumsum()
    totals = pandas.DataFrame(kept["diagnostics"])
    totals = totals.reindex(columns=["iteration", "tokens", "routing_seconds", "routing_share"]).astype(float)
    layers, bins = _layers(kept["diagnostics"], {layer["layer"]: layer for layer in header["layers"]})
    codebooks, codebook_iteration, notes_on_codebooks = _codebooks_of_run(folder, header, kept["diagnostics"])
    run = Run(
        name=name,
        folder=folder,
        header=header,
        steps=steps,
        totals=totals,
        layers=layers,
        bins=bins,
        resumes=(),
        codebooks=codebooks,
        codebook_iteration=codebook_iteration,
        notes=(*notes, *notes_on_codebooks),
    )
    marks = [
        Resume(iteration, run.tokens_at(iteration), num_superseded, changed)
        for iteration, num_superseded, changed in resumes
    ]
    return replace(run, resumes=tuple(marks))


def _records(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The checked lines of a file, and notes on incomplete ones.

    A start that is killed leaves at most one incomplete line, its last. So several in succession are those of starts
    that were killed while they wrote their header, after the one that left the first.
    """
    records, notes = [], []
    cut: list[int] = []  # numbers of the lines before this one that are no JSON
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except ValueError:
                if cut and not _is_cut_header(line):
                    raise ValueError(f"{path}, line {cut[0]} is not JSON") from None
                cut.append(number)
                continue
            if cut and (not isinstance(record, dict) or record.get("kind") != "run"):
                raise ValueError(f"{path}, line {cut[0]} is not JSON")
            notes += [_cut_short(f"line {of_cut}") for of_cut in cut]
            cut = []
            _check(record, f"{path}, line {number}", is_first=not records)
            records.append(_with_arrays(record))
    if not records:
        raise ValueError(f"{path}, line {cut[0]} is not JSON" if cut else f"{path} is empty")
    if cut:
        notes += [_cut_short(f"line {of_cut}") for of_cut in cut[:-1]] + [_cut_short("the last line")]
    return records, notes


def _is_cut_header(line: str) -> bool:
    """Whether a line that is no JSON is the beginning of a header.

    Example: '{"ki' and '{"kind": "run", "form' are; '{"kind": "st' and an empty line are not.
    """
    text = line.rstrip("\n")
    return text.startswith(_HEADER_START) or (text != "" and _HEADER_START.startswith(text))


def _cut_short(which: str) -> str:
    return f"{which} of {LINES} was cut short when the run was killed, and is left out"


def _check(record: Any, where: str, is_first: bool) -> None:
    kind = record.get("kind") if isinstance(record, dict) else None
    if not isinstance(kind, str) or kind not in _NUMBERS:
        raise ValueError(f"{where}: kind ({kind}) must be one of {', '.join(_NUMBERS)}")
    if is_first and kind != "run":
        raise ValueError(f"{where}: the first line must be of kind run, and is of kind {kind}")
    if kind == "run" and record.get("format") != FORMAT:
        raise ValueError(
            f"{where}: format ({record.get('format')}) must be {FORMAT}, the one that this version reads; make the "
            "page with the version that the run was trained with"
        )
    for name in _NUMBERS[kind]:
        if not _is_number(record.get(name)):
            raise ValueError(f"{where}: {name} ({record.get(name)}) of a line of kind {kind} must be a number")
    optional = _STEPS if kind == "step" else ()  # null or absent where they were not finite
    for name in optional:
        if record.get(name) is not None and not _is_number(record[name]):
            raise ValueError(f"{where}: {name} ({record[name]}) of a line of kind {kind} must be a number")
    if kind == "run" and not isinstance(record.get("arguments"), dict):
        raise ValueError(f"{where}: arguments must be an object of flags and values")
    if kind in ("run", "diagnostics"):
        layers = record.get("layers")
        if not isinstance(layers, list) or not all(_is_layer(layer) for layer in layers):
            raise ValueError(f"{where}: layers must be a list of objects that each have layer and router")
    for layer in record["layers"] if kind == "diagnostics" else []:
        for name in METRICS:
            if name in layer and layer[name] is not None and not _is_number(layer[name]):
                raise ValueError(f"{where}: {name} ({layer[name]}) of layer {layer['layer']} must be a number")
        for name in _BINS:
            bins = layer.get(name, [])
            if not isinstance(bins, list) or not all(value is None or _is_number(value) for value in bins):
                raise ValueError(f"{where}: {name} of layer {layer['layer']} must be a list of numbers")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_layer(layer: Any) -> bool:
    return isinstance(layer, dict) and isinstance(layer.get("layer"), int) and isinstance(layer.get("router"), str)


def _with_arrays(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its bins as arrays, because lists of numbers would take eight times the memory."""
    for layer in record["layers"] if record["kind"] == "diagnostics" else []:
        for name in _BINS:
            if layer.get(name):
                layer[name] = numpy.asarray(layer[name], dtype=numpy.float32)
    return record


def _superseded(
    records: list[dict[str, Any]],
) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]], list[tuple[int, int, dict[str, tuple[Any, Any]]]]]:
    """Valid lines by kind, valid headers, and (iteration, lines left out, changed flags) of each resume."""
    kept: dict[str, list[dict[str, Any]]] = {"step": [], "diagnostics": []}
    headers: list[dict[str, Any]] = []
    resumes: list[tuple[int, int, dict[str, tuple[Any, Any]]]] = []
    for record in records:
        if record["kind"] != "run":
            kept[record["kind"]].append(record)
            continue
        start = record["iteration"]
        before = sum(map(len, kept.values()))
        kept = {kind: [old for old in lines if old["iteration"] <= start] for kind, lines in kept.items()}
        num_superseded = before - sum(map(len, kept.values()))
        resumes = [resume for resume in resumes if resume[0] < start]
        valid = [old for old in headers if old["iteration"] < start]
        if headers:
            before = (valid or headers)[-1]
            resumes.append((start, num_superseded, changes(before["arguments"], record["arguments"])))
        headers = [*valid, record]
    return kept, headers, resumes


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The arguments that differ, with both values; None stands for a missing argument."""
    return {name: (old.get(name), new.get(name)) for name in sorted({*old, *new}) if old.get(name) != new.get(name)}


def _layers(
    records: list[dict[str, Any]], sizes: dict[int, dict[str, Any]]
) -> tuple[pandas.DataFrame, dict[int, dict[str, numpy.ndarray]]]:
    rows, bins = [], {}
    for record in records:
        for layer in record["layers"]:
            rows.append({"iteration": record["iteration"], "tokens": record["tokens"], **layer})
            of_layer = bins.setdefault(layer["layer"], {})
            for name in _BINS:
                if isinstance(layer.get(name), numpy.ndarray):
                    of_layer.setdefault(name, []).append((record["tokens"], layer[name]))
    frame = pandas.DataFrame(rows).reindex(columns=["iteration", "tokens", "layer", "router", *METRICS])
    frame[["iteration", "tokens", *METRICS]] = frame[["iteration", "tokens", *METRICS]].astype(float)
    frame["unused"] = 1 - frame["experts_used"]
    frame["unlisted"] = 1 - frame["experts_listed"]
    clusters = frame["layer"].map({number: layer.get("num_clusters", math.nan) for number, layer in sizes.items()})
    frame["idle"] = frame["idle_codewords"] / clusters.astype(float)
    frame["drift"] = 1 - frame["list_overlap"]
    arrays = {}
    for layer, of_layer in bins.items():
        arrays[layer] = {}
        for name, entries in of_layer.items():
            width = len(entries[-1][1])  # another number of bins before a resume cannot share the map
            entries = [(tokens, values) for tokens, values in entries if len(values) == width]
            arrays[layer][name] = numpy.stack([values for _, values in entries])
            arrays[layer][f"{name}_tokens"] = numpy.array([tokens for tokens, _ in entries], dtype=float)
    return frame, arrays


def _codebooks_of_run(
    folder: Path, header: dict[str, Any], diagnostics: list[dict[str, Any]]
) -> tuple[dict[int, Codebook], int | None, list[str]]:
    """The codebooks of a folder that belong to its run, their iteration, and notes on those that are left out.

    A run writes a diagnostics line before each snapshot, so a snapshot of another step is one of an earlier run or one
    that a resume supersedes. A run without AIR routers writes none, and one of an earlier run may have its steps.

    Args:
        header: the newest one.
        diagnostics: the run's valid lines of that kind.
    """
    if not (folder / SNAPSHOT).is_file():
        return {}, None, []
    routers = {layer["layer"]: layer["router"] for layer in header["layers"]}
    if "air" not in routers.values():
        return {}, None, [f"{SNAPSHOT} is left out: no layer of this run has an air router"]
    codebooks, iteration = _read_snapshot(folder / SNAPSHOT)
    if iteration not in {line["iteration"] for line in diagnostics}:
        note = f"{SNAPSHOT} is of step {iteration:,}, but this run has no metrics of that step; it is left out"
        return {}, None, [note]
    own = {layer: codebook for layer, codebook in codebooks.items() if routers.get(layer) == "air"}
    notes = [
        f"{SNAPSHOT} has a codebook of layer {layer}, which has no air router in this run; it is left out"
        for layer in codebooks
        if layer not in own
    ]
    return own, iteration, notes


def _read_snapshot(path: Path) -> tuple[dict[int, Codebook], int]:
    """Codebooks and iteration of a snapshot.

    Raises:
        ValueError: naming the file and what is wrong in it.
    """
    try:
        snapshot = json.loads(path.read_text(encoding="utf-8"))
        found = {}
        for layer in snapshot["layers"]:
            columns = [numpy.array(layer[name], dtype=float) for name in ("x", "y", "load", "recall")]
            tokens = layer.get("tokens")
            if len({column.shape for column in columns}) != 1 or (tokens and len(tokens) != len(columns[0])):
                raise ValueError(f"x, y, load, recall and tokens of layer {layer['layer']} differ in length")
            found[layer["layer"]] = Codebook(*columns, tokens or None)
        return found, int(snapshot["iteration"])
    except (ValueError, KeyError, TypeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no snapshot of codebooks: {what}") from None
