"""Files of training runs as the training loop writes them, with made-up but plausible figures."""

import json
import math
from pathlib import Path

import numpy

SEQUENCE, BATCH, TOPK = 256, 16, 32
STEP_TOKENS = SEQUENCE * BATCH
# Figures beyond the loads that a router has, at the start and at the end of training.
OF_AIR = {
    "mass_recall": (0.3, 0.12),
    "paper_bound": (0.02, 0.0001),
    "mass_bound": (0.12, 0.05),
    "certified": (0.3, 0.1),
    "topk_recall": (0.4, 0.85),
    "quantization_error": (0.05, 0.15),
    "codeword_entropy": (0.95, 0.85),
    "idle_codewords": (80.0, 170.0),
    "list_overlap": (0.5, 0.9),
    "experts_listed": (1.0, 1.0),
}
OF_ALL = {
    "experts_used": (0.6, 0.92),
    "imbalance_factor": (6.0, 2.5),
    "rank_imbalance": (1.1, 1.01),
    "routing_seconds": (0.02, 0.02),
}
SIZES = {"num_clusters": 512, "shortlist_size": 72, "num_probes": 8, "num_candidates": 128, "num_explored": 0}


def header(router="air", num_layers=2, iteration=0, num_experts=16384, hidden=128, num_hash_layers=0, **arguments):
    """A line of kind run; its first ``num_hash_layers`` layers are by hash."""
    exact = 2 * hidden * num_experts

    def of_layer(layer, router):
        own = {"topk": exact, "hash": 0, "vq": 2 * exact}.get(router, exact / 20)
        flops = {"exact_router_flops_per_token": exact, "router_flops_per_token": own}
        sizes = {"layer": layer, "router": router, "num_experts": num_experts, "topk": TOPK}
        return sizes | flops | (SIZES if router == "air" else {})

    return {
        "kind": "run",
        "format": 1,
        "time": 1e9 + iteration,
        "iteration": iteration,
        "arguments": {"moe_router_type": router, "lr": 0.003, "num_layers": num_layers, **arguments},
        "versions": {"air_moe_megatron": "0.1.0", "megatron_core": "0.19.2", "torch": "2.11.0"},
        "device": "CPU, 2 processes",
        "tokenizer": {"type": "NullTokenizer", "model": None, "vocab_size": 257},
        "layers": [
            of_layer(layer, "hash" if layer <= num_hash_layers else router) for layer in range(1, num_layers + 1)
        ],
    }


def step(iteration, loss=None):
    """A line of kind step."""
    return {
        "kind": "step",
        "iteration": iteration,
        "tokens": iteration * STEP_TOKENS,
        "time": 1e9 + iteration,
        "step_seconds": 0.25,
        "loss": 1.7 + 4 * math.exp(-iteration / 60) if loss is None else loss,
        "grad_norm": 0.5,
    }


def diagnostics(iteration, end, router="air", num_layers=2, num_bins=64, seed=0, num_hash_layers=0, **changed):
    """A line of kind diagnostics; ``changed`` figures are those of every layer."""
    generator = numpy.random.default_rng((seed, iteration))
    layers = []
    for layer in range(1, num_layers + 1):
        of_layer = "hash" if layer <= num_hash_layers else router
        figures = OF_ALL | (OF_AIR if of_layer == "air" else {})
        values = {
            name: first + (last - first) * (1 - math.exp(-4 * iteration / end))
            for name, (first, last) in figures.items()
        }
        values = {name: value * (1 + 0.01 * generator.standard_normal()) for name, value in values.items()}
        values = {name: min(value, 1.0) if figures[name][1] <= 1 else value for name, value in values.items()}
        loads = generator.gamma(4, 0.25, num_bins)
        values |= {"load_bins": loads.round(3).tolist(), "max_bins": (6 * loads).round(3).tolist()}
        layers.append({"layer": layer, "router": of_layer, **values, **changed})
    return {
        "kind": "diagnostics",
        "iteration": iteration,
        "tokens": iteration * STEP_TOKENS,
        "time": 1e9 + iteration,
        "routing_seconds": 0.02 * num_layers,
        "routing_share": 0.08 * num_layers / 2,
        "layers": layers,
    }


def lines(router="air", num_layers=2, end=200, interval=20, seed=0, num_hash_layers=0, **changed):
    """The lines of a run from its start; ``changed`` are figures of all layers."""
    found = [header(router, num_layers, num_hash_layers=num_hash_layers)]
    for iteration in range(interval, end + 1, interval):
        measured = diagnostics(
            iteration, end, router, num_layers, seed=seed, num_hash_layers=num_hash_layers, **changed
        )
        found += [step(iteration), measured]
    return found


def codebook(iteration=200, num_layers=2, num_clusters=512, seed=0):
    """A snapshot of codebooks."""
    generator = numpy.random.default_rng(seed)
    layers = []
    for layer in range(1, num_layers + 1):
        x, y = 0.4 * generator.standard_normal((2, num_clusters))
        load = generator.zipf(1.5, num_clusters).clip(max=3000) - 1
        recall = generator.beta(6, 2, num_clusters).round(4).tolist()
        layers.append(
            {
                "layer": layer,
                "x": x.round(4).tolist(),
                "y": y.round(4).tolist(),
                "load": load.tolist(),
                "recall": [None if count == 0 else share for count, share in zip(load.tolist(), recall, strict=True)],
                "tokens": [
                    [
                        [int(token), int(count) // (place + 1)]
                        for place, token in enumerate(generator.integers(0, 257, 5))
                    ]
                    for count in load
                ],
            }
        )
    return {"iteration": iteration, "layers": layers}


def write(folder: Path, records, snapshot=None) -> Path:
    """Write the files of a run; text among the records stands as it is. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "air_diagnostics.jsonl").write_text("".join(f"{text}\n" for text in texts))
    if snapshot:
        (folder / "air_codebook.json").write_text(json.dumps(snapshot))
    return folder
