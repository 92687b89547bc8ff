"""Tokens for codebooks, one global batch of learning, and the state after it."""

import torch

from air_moe_megatron.ops.coarse import assign_with_statistics

# Sums of a few hundred fp32 numbers in another order.
CLOSE = dict(rtol=1e-5, atol=1e-6)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clustered(num_tokens, num_clusters, hidden_size, noise=0.1, seed=0):
    """Tokens of random length around ``num_clusters`` random directions."""
    centers = torch.nn.functional.normalize(randn(num_clusters, hidden_size, seed=100), dim=1)  # whatever the seed
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(num_clusters, (num_tokens,), generator=generator)
    directions = centers[which] + noise * torch.randn(num_tokens, hidden_size, generator=generator) / hidden_size**0.5
    return directions * (0.5 + 2.0 * torch.rand(num_tokens, 1, generator=generator))


def learn(codebook, *batches, padding_mask=None):
    """One global batch: the microbatches accumulated, then the update of one rank."""
    for hidden in batches:
        codebook.accumulate(assign_with_statistics(hidden, codebook.codewords, 1, padding_mask=padding_mask)[1])
    statistics = codebook.statistics.clone()
    codebook.apply_update(statistics, bool(statistics.isfinite().all()))
    codebook.discard()


def state(codebook):
    return {name: value.clone() for name, value in codebook.state_dict().items()}


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name
