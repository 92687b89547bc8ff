"""HashRouter: fixed, distinct, balanced experts of each token id; how the ids reach it."""

import pytest
import torch
from megatron.core import dist_checkpointing

from air_moe_megatron.routers.hash_tables import balanced_table, frequency_table
from air_moe_megatron.routers.hashing import HashRouter, balance_hash_tables, hand_over_token_ids
from tests.builders import HIDDEN, VOCABULARY, make_config, make_router, tell_ids

pytestmark = pytest.mark.usefixtures("megatron_cpu")


@pytest.mark.parametrize(
    "num_ids, topk, num_experts",
    [(1000, 4, 64), (999, 3, 64), (40, 6, 64), (500, 8, 12), (100, 7, 7), (5, 1, 3), (3, 2, 64), (1, 1, 1)],
)
def test_tables_are_distinct_and_balanced(num_ids, topk, num_experts):
    table = balanced_table(num_ids, topk, num_experts, seed=1)
    assert table.shape == (num_ids, topk) and table.dtype == torch.int32
    assert all(len(set(row)) == topk for row in table.tolist())
    counts = torch.bincount(table.flatten().long(), minlength=num_experts)
    assert counts.numel() == num_experts
    assert int(counts.max() - counts.min()) <= 1


def test_tables_depend_on_seed_and_layer_alone(megatron_cpu):
    tables = {}
    for seed in (0, 1):
        for layer in (1, 2):
            for attempt in range(2):
                torch.manual_seed(attempt)
                router = make_router(megatron_cpu, moe_router_type="hash", moe_hash_seed=seed)
                router.set_layer_number(layer)
                tables[seed, layer, attempt] = router.table.clone()
            assert torch.equal(tables[seed, layer, 0], tables[seed, layer, 1])
    alike = [torch.equal(tables[a], tables[b]) for a in tables for b in tables if a[:2] != b[:2]]
    assert not any(alike)


def test_experts_depend_on_the_token_id_alone_and_weigh_the_same(megatron_cpu):
    router = make_router(megatron_cpu, moe_router_type="hash")
    ids = torch.randint(VOCABULARY, (3, 5))
    tell_ids(router, ids)
    routes = router.route(torch.randn(5, 3, HIDDEN))
    assert torch.equal(routes.topk_ids, router.table[ids.t().reshape(-1)])
    assert torch.equal(routes.probs, torch.full((15, 4), 0.25))
    assert torch.equal(router.route(torch.randn(5, 3, HIDDEN)).topk_ids, routes.topk_ids)


def test_sequence_parallel_ranks_take_their_part_of_the_sequence(megatron_cpu):
    class Rank:
        def __init__(self, rank):
            self.rank, self.size = lambda: rank, lambda: 2

    router = make_router(megatron_cpu, moe_router_type="hash")
    router.config.sequence_parallel = True
    tell_ids(router, torch.arange(12).view(2, 6))
    for rank, expected in ((0, [0, 6, 1, 7, 2, 8]), (1, [3, 9, 4, 10, 5, 11])):
        router.tp_group = Rank(rank)
        assert torch.equal(router.route(torch.randn(3, 2, HIDDEN)).topk_ids, router.table[expected])


def test_missing_and_wrong_token_ids_are_named(megatron_cpu):
    router = make_router(megatron_cpu, moe_router_type="hash")
    with pytest.raises(ValueError, match="layer 1: the router has been given no token ids"):
        router.route(torch.randn(5, 3, HIDDEN))
    tell_ids(router, torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="layer 1: 15 tokens, but 12 token ids"):
        router.route(torch.randn(5, 3, HIDDEN))


def test_a_router_without_a_layer_number_is_refused(megatron_cpu):
    config = make_config(moe_router_type="hash")
    router = HashRouter(config, megatron_cpu)
    tell_ids(router, torch.zeros(3, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"layer_number \(None\)"):
        router.route(torch.randn(5, 3, HIDDEN))


def test_a_checkpoint_of_another_seed_is_refused(megatron_cpu):
    router, other = (make_router(megatron_cpu, moe_router_type="hash", moe_hash_seed=seed) for seed in (1, 2))
    with pytest.raises(ValueError, match=r"moe_hash_seed \(2\) must be that of the checkpoint, 1"):
        other.load_state_dict(router.state_dict())


def zipf(num_ids, num_tokens=100_000):
    """Counts of ids in random order, the most frequent of them 1 of ln(V) tokens."""
    counts = num_tokens / torch.arange(1, num_ids + 1, dtype=torch.float64)
    return counts[torch.randperm(num_ids, generator=torch.Generator().manual_seed(0))].floor()


def loads_of(table, counts, num_experts):
    loads = torch.zeros(num_experts, dtype=torch.float64)
    for row, count in zip(table.tolist(), counts.tolist(), strict=True):
        for expert in row:
            loads[expert] += count
    return loads


def evenest_imbalance(counts, topk, num_experts):
    """The least imbalance factor that K experts per id allow: none has fewer tokens than one of its ids."""
    shares, rest, squares, total = counts.sort(descending=True).values.tolist(), num_experts, 0.0, topk * counts.sum()
    left = float(total)
    for count in shares:
        if count * rest <= left:
            break
        squares, left, rest = squares + topk * count**2, left - topk * count, rest - topk
    return float(num_experts * (squares + left**2 / rest) / total**2)


@pytest.mark.parametrize(
    "num_ids, topk, num_experts", [(2000, 4, 64), (999, 3, 64), (500, 8, 12), (100, 7, 7), (5, 1, 3), (40, 6, 512)]
)
def test_tables_by_frequency_are_distinct_and_as_even_as_can_be(num_ids, topk, num_experts):
    counts = zipf(num_ids)
    table = frequency_table(counts, topk, num_experts, seed=1)
    assert table.shape == (num_ids, topk) and table.dtype == torch.int32
    assert all(len(set(row)) == topk and 0 <= min(row) and max(row) < num_experts for row in table.tolist())
    assert torch.equal(table, frequency_table(counts, topk, num_experts, seed=1))

    def imbalance(table):
        loads = loads_of(table, counts, num_experts)
        return float(num_experts * loads.square().sum() / loads.sum().square())

    least = evenest_imbalance(counts, topk, num_experts)
    assert least - 1e-9 <= imbalance(table) <= 1.001 * least + 0.02 * (num_ids < 10)
    by_ids = imbalance(balanced_table(num_ids, topk, num_experts, seed=1))
    assert imbalance(table) <= by_ids + 1e-9


def test_ids_do_not_share_all_their_experts():
    table, other = (frequency_table(zipf(2000), 4, 512, seed=seed) for seed in (1, 2))
    assert not torch.equal(table, other)
    rows = [frozenset(row) for row in table.tolist()]
    assert len(set(rows)) > 0.99 * len(rows)
    assert not {frozenset(row) for row in other.tolist()[:100]} & set(rows[:100])


def test_frequency_worked_example():
    table = frequency_table(torch.tensor([6, 2, 2, 2]), 1, 2, seed=0)
    assert table[1:].unique().tolist() == [1 - int(table[0])]


def test_a_table_by_frequency_needs_counts_or_a_checkpoint(megatron_cpu):
    fields = dict(moe_router_type="hash", moe_hash_balance="frequency")
    router, loaded = (make_router(megatron_cpu, **fields) for _ in range(2))
    ids = torch.arange(15).view(3, 5)
    for one in (router, loaded):
        tell_ids(one, ids)
        with pytest.raises(ValueError, match="'frequency' needs the counts of the token ids; call balance_hash_tables"):
            one.route(torch.randn(5, 3, HIDDEN))
    counts = zipf(VOCABULARY - 3)
    assert balance_hash_tables(counts.tolist(), [router]) == [router]
    expected = frequency_table(torch.cat((counts, torch.zeros(3))), 4, 64, seed=1)
    assert torch.equal(router.table, expected)
    loaded.load_state_dict(router.state_dict())
    for one in (router, loaded):
        assert torch.equal(one.route(torch.randn(5, 3, HIDDEN)).topk_ids, expected[ids.t().reshape(-1)])
    with pytest.raises(ValueError, match=r"counts \(41\) must not exceed the token ids, moe_hash_vocab_size \(40\)"):
        balance_hash_tables([1.0] * (VOCABULARY + 1), [router])


@pytest.mark.parametrize("padded", (VOCABULARY + 24, VOCABULARY - 8))
def test_a_vocabulary_padded_to_another_size_loads(megatron_cpu, tmp_path, padded):
    router = make_router(megatron_cpu, moe_router_type="hash")
    dist_checkpointing.save(router.sharded_state_dict("router."), str(tmp_path))
    other = make_router(megatron_cpu, moe_router_type="hash", moe_hash_vocab_size=padded)
    shared = min(padded, VOCABULARY)
    assert not torch.equal(other.table[:shared], router.table[:shared])
    state = dist_checkpointing.load(other.sharded_state_dict("router."), str(tmp_path))
    other.load_state_dict({name.removeprefix("router."): value for name, value in state.items()})
    assert torch.equal(other.table[:shared], router.table[:shared])
    assert not other.table[shared:].any()


@pytest.mark.parametrize("by_name", (True, False))
def test_the_embedding_hands_over_the_ids(megatron_cpu, by_name):
    class Embedding(torch.nn.Module):
        def forward(self, input_ids, position_ids=None):
            return input_ids

    routers = [make_router(megatron_cpu, moe_router_type="hash") for _ in range(2)]
    model = torch.nn.ModuleDict({"embedding": Embedding(), "decoder": torch.nn.ModuleList(routers)})
    assert hand_over_token_ids([model]) == [model]
    ids = torch.arange(6).view(2, 3)
    model["embedding"](input_ids=ids, position_ids=None) if by_name else model["embedding"](ids)
    assert all(router.token_ids is ids for router in routers)
    with pytest.raises(ValueError, match="need the model's embedding"):
        hand_over_token_ids([torch.nn.ModuleList(routers)])


REFUSED = {
    "vocabulary": (dict(moe_hash_vocab_size=0), "moe_hash_vocab_size (0)"),
    "pipeline": (
        dict(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32),
        "pipeline_model_parallel_size (2)",
    ),
    "mtp": (dict(mtp_num_layers=1), "mtp_num_layers (1)"),
    "z-loss": (dict(moe_z_loss_coeff=0.1), "moe_z_loss_coeff (0.1)"),
    "jitter": (dict(moe_input_jitter_eps=0.1), "moe_input_jitter_eps (0.1)"),
    "sigmoid": (dict(moe_router_score_function="sigmoid"), "moe_router_score_function ('sigmoid')"),
    "pre-softmax": (dict(moe_router_pre_softmax=True), "moe_router_pre_softmax (True)"),
    "aux": (dict(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.1), "moe_aux_loss_coeff (0.1)"),
    "forced": (dict(moe_router_force_load_balancing=True), "moe_router_force_load_balancing (True)"),
    "seed": (dict(moe_hash_seed=-1), "moe_hash_seed (-1)"),
    "large-seed": (dict(moe_hash_seed=2**46), f"moe_hash_seed ({2**46}) must be from 0 to below 2^46"),
    "balance": (dict(moe_hash_balance="none"), "moe_hash_balance ('none') must be 'ids' or 'frequency'"),
    "counts": (dict(moe_hash_counts="file"), "moe_hash_counts ('file') has no effect with moe_hash_balance 'ids'"),
}


@pytest.mark.parametrize("settings, words", REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_refused(settings, words):
    with pytest.raises(ValueError) as error:
        make_config(moe_router_type="hash", **settings)
    assert words in str(error.value)


def test_the_largest_seed_makes_a_table(megatron_cpu):
    router = make_router(megatron_cpu, moe_router_type="hash", moe_hash_seed=2**46 - 1)
    assert router.table.any() and int(router.seed) == 2**46 - 1
