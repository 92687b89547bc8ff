"""Continuing texts with Megatron's key-value cache: equal to one forward, alone or in a batch, and without a trace."""

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel

from air_moe_megatron.inference.generation import Sampling, continue_prompts
from air_moe_megatron.inference.text import ByteTokenizer
from air_moe_megatron.routers import find_routers
from air_moe_megatron.routers.hashing import hand_over_token_ids
from air_moe_megatron.specs import with_air_layers
from air_moe_megatron.sync import update_codebooks
from tests.builders import STOCK, make_config

TYPES = ("topk", "air", "product_key", "hierarchical", "hash", "vq")
PADDED = 264  # ids of the embedding: 256 bytes, the end of a document, and padding
LENGTH = 12
TOLERANCE = dict(rtol=1e-5, atol=1e-5)  # fp32: the sums of attention and of the experts' products differ in order


def make_model(groups, router_type, num_layers=2, **fields):
    """A small GPT in evaluation mode that has learned from one batch."""
    config = make_config(
        num_layers=num_layers,
        num_moe_experts=16,
        moe_router_type=router_type,
        moe_ffn_hidden_size=4,
        moe_router_topk_scaling_factor=4.0,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        normalization="RMSNorm",
        masked_softmax_fusion=False,
        **({"moe_hash_vocab_size": PADDED} if router_type == "hash" else {}),
        **fields,
    )
    torch.manual_seed(1)
    spec = with_air_layers(get_gpt_layer_local_spec(num_experts=16, normalization="RMSNorm"), config)
    model = GPTModel(config, spec, PADDED, 64, position_embedding_type="rope", pg_collection=groups)
    hand_over_token_ids([model])
    model(*inputs(torch.randint(0, 256, (4, 16)))).sum().backward()
    update_codebooks(model)
    model.zero_grad()
    return model.eval()


def inputs(tokens):
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return tokens, positions, None


class Experts:
    """Records the experts that a model's routers choose: for each router [S, B, K], sorted."""

    def __init__(self, model, batch):
        self.batch = batch
        self.found = {router: [] for router in find_routers(model)}
        self.hooks = [router.register_forward_hook(self.record) for router in self.found]

    def record(self, router, args, output):
        ids = output[1]
        if ids.dtype == torch.bool:
            ids = ids.nonzero()[:, 1].view(len(ids), -1)
        self.found[router].append(ids.sort(dim=1).values.view(-1, self.batch, ids.shape[1]))

    def take(self):
        for hook in self.hooks:
            hook.remove()
        return torch.stack([torch.cat(parts) for parts in self.found.values()])


def decode(model, tokens):
    """Logits [B, S, V] of a prefill of three tokens and then one token at a time."""
    context = StaticInferenceContext(tokens.shape[0], tokens.shape[1])
    context.config.materialize_only_last_token_logits = False
    wrapper = GPTInferenceWrapper(model, context)
    wrapper.prep_model_for_inference()
    whole = wrapper.prep_inference_input(tokens)
    logits, start = [], 0
    for end in range(3, tokens.shape[1] + 1):
        logits.append(wrapper.run_one_forward_step(wrapper.get_batch_for_context_window(whole, start, end)))
        start = end
    return torch.cat(logits, dim=1)


def assert_decodes_as_one_forward(model, batch, length=LENGTH):
    tokens = torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        recorder = Experts(model, batch)
        expected = model(*inputs(tokens))
        experts = recorder.take()
        recorder = Experts(model, batch)
        found = decode(model, tokens)
        assert torch.equal(recorder.take(), experts)
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("path", ({}, STOCK | {"moe_granular_experts": True}), ids=("compact", "stock"))
@pytest.mark.parametrize("router_type", TYPES)
def test_decoding_with_a_cache_equals_one_forward(megatron_cpu, router_type, path):
    model = make_model(megatron_cpu, router_type, **path)
    for batch in (1, 2):
        assert_decodes_as_one_forward(model, batch)


def test_a_first_layer_by_hash_decodes_as_one_forward(megatron_cpu):
    model = make_model(megatron_cpu, "air", moe_hash_seed=1, moe_num_hash_layers=1, moe_hash_vocab_size=PADDED)
    assert_decodes_as_one_forward(model, batch=1)


@pytest.mark.parametrize("router_type", ("air", "product_key"))
def test_the_kernels_decode_single_tokens_and_unequal_prompts(megatron_cpu, router_type, monkeypatch):
    model = make_model(megatron_cpu, router_type, num_layers=1)
    expected = continue_prompts(model, ByteTokenizer(), ["a", "bc"], 2)
    monkeypatch.setenv("AIR_MOE_BACKEND", "triton")
    assert_decodes_as_one_forward(model, batch=1, length=4)
    assert continue_prompts(model, ByteTokenizer(), ["a", "bc"], 2) == expected


PROMPTS = ["a", "def f(x):", "class A", "äö"]


@pytest.mark.parametrize("router_type", TYPES)
def test_a_prompt_is_continued_in_a_batch_as_alone(megatron_cpu, router_type):
    model = make_model(megatron_cpu, router_type)
    together = continue_prompts(model, ByteTokenizer(), PROMPTS, 8)
    assert [one.prompt for one in together] == PROMPTS
    assert together == [continue_prompts(model, ByteTokenizer(), [prompt], 8)[0] for prompt in PROMPTS]


def greedy(model, ids, num_tokens):
    """The reference: a whole forward for every token."""
    for _ in range(num_tokens):
        with torch.no_grad():
            ids = [*ids, int(model(*inputs(torch.tensor([ids])))[0, -1, : ByteTokenizer.vocab_size].argmax())]
    return ids


def test_the_most_probable_tokens_are_those_of_whole_forwards(megatron_cpu):
    model = make_model(megatron_cpu, "air")
    for one in continue_prompts(model, ByteTokenizer(), PROMPTS, 8):
        expected = greedy(model, one.prompt_ids, 8)[len(one.prompt_ids) :]
        assert one.ids == expected[: len(one.ids)] and one.is_ended == (ByteTokenizer().eod in expected)


def test_samples_follow_seed_and_settings_and_are_no_padding(megatron_cpu):
    model = make_model(megatron_cpu, "air")
    with torch.no_grad():  # the ids beyond the vocabulary would win
        model.output_layer.weight[257:] = 10 * model.output_layer.weight[:1]
        model.decoder.final_layernorm.weight.fill_(0.3)

    def sample(seed, **settings):
        return [
            one.ids for one in continue_prompts(model, ByteTokenizer(), ["ab", "b"], 12, Sampling(**settings), seed)
        ]

    hot = sample(3, temperature=1.5)
    assert hot == sample(3, temperature=1.5) and hot != sample(4, temperature=1.5)
    assert all(0 <= token < 257 for ids in hot for token in ids)
    best = sample(3)
    assert sample(3, temperature=1.0, top_k=1) == best == sample(9, temperature=1.0, top_p=1e-6)
    assert len({token for ids in sample(3, temperature=9.0, top_k=2) for token in ids}) > 1


OF_ONE_FORWARD = ("token_ids", "training", "_is_counted", "_learns")  # what each forward sets anew


def state_of(model):
    """Everything that a router could change: parameters, buffers saved or not, counters and samples."""
    state = {}
    for name, module in model.named_modules():
        tensors = {**module._parameters, **module._buffers}
        tensors |= {key: value for key, value in vars(module).items() if isinstance(value, (torch.Tensor, int, bool))}
        state |= {f"{name}.{key}": value for key, value in tensors.items() if key not in OF_ONE_FORWARD}
    for number, router in enumerate(find_routers(model)):
        sample = getattr(router, "sample", None)
        state[f"sample {number}"] = None if sample is None else sample.hidden
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}


@pytest.mark.parametrize("router_type", TYPES)
def test_generating_changes_no_state(megatron_cpu, router_type):
    norm = {} if router_type in ("product_key", "hash") else {"moe_router_input_norm": "running"}
    model = make_model(megatron_cpu, router_type, **norm)
    before = state_of(model)
    assert any(name.endswith("expert_load") for name in before)
    continue_prompts(model, ByteTokenizer(), PROMPTS, 4)
    after = state_of(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
        assert same, name
