"""How the time of a routing step grows with the number of experts, at automatic sizes."""

import logging

from benchmarks import gates
from benchmarks.measure import world
from benchmarks.models import Sizes, add_sizes, air_work, inputs, make_router, settle, step
from benchmarks.race import Contender, race

logger = logging.getLogger(__name__)


def add_arguments(parser) -> None:
    parser.add_argument("--experts", type=int, nargs="+", default=[65_536, 1_048_576], help="numbers of experts E")
    add_sizes(parser, hidden=128, tokens=16_384, topk=64)


def run(args) -> list[dict]:
    """Time ``AIRRouter.route`` forward and backward for each number of experts, after the gates."""
    with world() as (device, pg_collection):
        gates.gate_router(pg_collection, device)
        contenders, columns = {}, {}
        for num_experts in args.experts:
            sizes = Sizes.of(args, experts=num_experts)
            hidden, grad = inputs(sizes, device, (args.tokens, 1, args.hidden), (args.tokens, args.topk))
            router = make_router("air", sizes, pg_collection, device)
            logger.info("%d experts: building the shortlists", num_experts)
            settle(router, hidden)
            gates.gate_lists(router)
            gates.gate_at_size(router, hidden, num_checked=16)
            name = f"AIRRouter.route, E = {num_experts}"
            contenders[name] = Contender(
                lambda router=router, hidden=hidden, grad=grad: step(
                    lambda x: router.route(x).probs, router, hidden, grad
                ),
                air_work(router, hidden, sizes),
                args.tokens,
            )
            lists = {"clusters": router.sizes.num_clusters, "shortlist": router.sizes.shortlist_size}
            columns[name] = sizes.columns() | lists
        outcome = race(contenders, args, device)
        first = outcome.median(next(iter(contenders)))
        return [
            outcome.row(name, columns[name], {"times_slower": round(outcome.median(name) / first, 2)})
            for name in contenders
        ]
