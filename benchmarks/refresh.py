"""The cost of AIR-MoE beside its steps: shortlist rebuilds and codebook updates, as shares of a step."""

import copy

from benchmarks import checks, roofline
from benchmarks.arguments import positive
from benchmarks.layer import layer_work
from benchmarks.measure import world
from benchmarks.models import (
    Sizes,
    add_sizes,
    layer_inputs,
    layer_step,
    make_layer,
    rebuild_run,
    rebuild_work,
    warm_up_codebook,
)
from benchmarks.router import codebook_update_run
from benchmarks.timing import Case, time_interleaved

NUM_LAYERS = 24  # layers of a model, whose codebooks are updated together
_OF_MODEL = f"codebook updates of {NUM_LAYERS} layers"


def add_arguments(parser) -> None:
    add_sizes(parser, experts=65_536, hidden=512, tokens=8192, topk=64, ffn=1)
    parser.add_argument("--interval", type=positive, default=20, help="steps between two rebuilds, as in training")


def run(args) -> list[dict]:
    """Time a whole rebuild, and compare its share per step with a step of the whole layer without a rebuild.

    Updates of several codebooks are compared with the steps of as many layers.

    The share refers to a step without a rebuild; relative to one with a rebuild it would be smaller. In training the
    work is spread over the steps of the interval and over ranks. A young codebook rebuilds more often, for ten times
    ``--interval`` steps; the figures are for the time after that. The first two rebuilds of a training try all experts
    at all codewords.
    """
    with world() as (device, pg_collection):
        checks.check_router(pg_collection, device)
        checks.check_layer("AIRMoELayer", pg_collection, device)
        sizes = Sizes.of(args)
        layer = make_layer("AIRMoELayer", sizes, pg_collection, device)
        hidden, grad = layer_inputs(sizes, device)
        learner = warm_up_codebook(layer.router, hidden)
        checks.check_at_size(layer.router, hidden)
        learner.route(hidden)
        rebuild = rebuild_run(layer.router)
        rebuild()
        checks.check_lists(layer.router, rebuild.index)
        update = roofline.codebook_update(layer.router.sizes.num_clusters, args.hidden)
        cases = {
            "AIRMoELayer": Case(lambda: layer_step(layer, hidden, grad), layer_work(layer, hidden, sizes), args.tokens),
            "shortlist rebuild": Case(rebuild, rebuild_work(layer.router, sizes)),
            "shortlist rebuild, in full": Case(
                rebuild_run(layer.router, in_full=True), rebuild_work(layer.router, sizes, in_full=True)
            ),
            "codebook update": Case(codebook_update_run(learner), update),
            _OF_MODEL: Case(
                codebook_update_run(*(copy.deepcopy(learner) for _ in range(NUM_LAYERS))),
                {phase: sum([work] * NUM_LAYERS, roofline.Work()) for phase, work in update.items()},
            ),
        }
        outcome = time_interleaved(cases, args, device)
        sizes_of_air = {"clusters": layer.router.sizes.num_clusters, "shortlist": layer.router.sizes.shortlist_size}
        step_seconds = outcome.median("AIRMoELayer")
        rows = []
        intervals = {"AIRMoELayer": "", "shortlist rebuild": args.interval, "shortlist rebuild, in full": ""}
        for name, interval in (intervals | {"codebook update": 1, _OF_MODEL: 1}).items():
            figures = dict.fromkeys(("every_steps", "per_step_ms", "percent_of_step"), "")
            if interval:
                per_step = outcome.median(name) / interval
                num_layers = NUM_LAYERS if name == _OF_MODEL else 1
                share = round(100 * per_step / (num_layers * step_seconds), 2)
                figures = {"every_steps": interval, "per_step_ms": round(1e3 * per_step, 3), "percent_of_step": share}
            rows.append(outcome.row(name, sizes.columns() | {"ffn": args.ffn} | sizes_of_air, figures))
        return rows
