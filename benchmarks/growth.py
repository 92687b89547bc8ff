"""How the time of a routing step grows with the number of experts, at automatic sizes."""

import logging

from benchmarks import checks
from benchmarks.arguments import positive
from benchmarks.measure import world
from benchmarks.models import Sizes, add_sizes, air_columns, air_work, inputs, make_router, step, warm_up_codebook
from benchmarks.timing import Case, time_interleaved

logger = logging.getLogger(__name__)


def add_arguments(parser) -> None:
    parser.add_argument("--experts", type=positive, nargs="+", default=[65_536, 1_048_576], help="numbers of experts E")
    add_sizes(parser, hidden=128, tokens=16_384, topk=64)


def run(args) -> list[dict]:
    """Time ``AIRRouter.route`` forward and backward for each number of experts, after the correctness checks."""
    with world() as (device, pg_collection):
        checks.check_router(pg_collection, device)
        cases, columns = {}, {}
        for num_experts in args.experts:
            sizes = Sizes.of(args, experts=num_experts)
            hidden, grad = inputs(sizes, device, (args.tokens, 1, args.hidden), (args.tokens, args.topk))
            router = make_router("air", sizes, pg_collection, device)
            logger.info("%d experts: building the shortlists", num_experts)
            warm_up_codebook(router, hidden)
            checks.check_lists(router)
            checks.check_at_size(router, hidden, num_checked=16)
            name = f"AIRRouter.route, E = {num_experts}"
            cases[name] = Case(
                lambda router=router, hidden=hidden, grad=grad: step(
                    lambda x: router.route(x).probs, router, hidden, grad
                ),
                air_work(router, hidden, sizes),
                args.tokens,
            )
            columns[name] = sizes.columns() | air_columns(router)
        outcome = time_interleaved(cases, args, device)
        first = outcome.median(next(iter(cases)))
        return [
            outcome.row(name, columns[name], {"times_slower": round(outcome.median(name) / first, 2)}) for name in cases
        ]
