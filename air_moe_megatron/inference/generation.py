"""Continue texts with a trained model, through Megatron's own inference.

Megatron has two engines. The dynamic one needs CUDA and FlashAttention; the static one runs on CPU too. This module
calls the static engine's loop, ``TextGenerationController.generate_all_output_tokens_static_batch``, with a key-value
cache. Prompts of unequal lengths share a batch without padding: the first forward reads as many tokens of each prompt
as the shortest one has. Each later forward reads one token per text: the next one of a longer prompt, or a new one.
"""

import argparse
import contextlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.inference_request import InferenceRequest, Status
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.inference.utils import InferenceMode

from air_moe_megatron.command import console
from air_moe_megatron.command.console import flag_of
from air_moe_megatron.inference import restore
from air_moe_megatron.inference.text import Tokenizer, tokenizer_of
from air_moe_megatron.process_groups import process_groups_released

_DROPPING = ("moe_expert_capacity_factor", "moe_pad_expert_input_to_capacity", "moe_token_drop_policy")
"""Fields of a checkpoint that are ignored. With them a token's experts would depend on the other tokens of its batch: a
forward over one token would drop other tokens than a forward over the whole text."""

_SINGLE = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the model's probabilities."""

    temperature: float = 0.0
    """0 always takes the most probable token."""
    top_k: int = 0
    """Sample among this many tokens; 0 means all."""
    top_p: float = 0.0
    """Sample among the most probable tokens that hold this share of the probability; 0 means all."""


@dataclass(frozen=True)
class Continuation:
    """A prompt and its continuation by the model."""

    prompt: str
    text: str
    prompt_ids: list[int]
    ids: list[int]
    is_ended: bool  # by the end of a document, before the largest number of tokens


class _Controller(TextGenerationController):
    """Megatron's controller, which here never samples ids that only pad the vocabulary."""

    def sample_from_logits(self, last_token_logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        is_padding = torch.arange(last_token_logits.shape[-1], device=last_token_logits.device)
        is_padding = is_padding >= self.tokenizer.vocab_size
        return super().sample_from_logits(last_token_logits.masked_fill(is_padding, float("-inf")), *args, **kwargs)


@torch.inference_mode()
def continue_prompts(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    num_tokens: int,
    sampling: Sampling = Sampling(),
    seed: int = 1234,
) -> list[Continuation]:
    """Continue prompts of any lengths, all in one batch. Waits for the device at every token.

    With expert parallelism every rank of the group must call it with the same arguments, and gets the same texts.

    Args:
        model: one model chunk in evaluation mode, as ``restore.build_and_load`` returns it.
        tokenizer: the model's tokenizer.
        prompts: at least one, none of them empty.
        num_tokens: largest number of tokens of each continuation, which ends earlier at the end of a document.
        sampling: how a token is chosen.
        seed: seed of the samples; the same batch of prompts then has the same continuations.
    Returns:
        the continuations, in the order of the prompts.
    """
    prompt_ids = [tokenizer.tokenize(prompt) for prompt in prompts]
    context = StaticInferenceContext(len(prompts), max(map(len, prompt_ids)) + num_tokens)
    context.config.offset_sampling_seed_by_dp_rank = False  # ranks that share experts must stay in step
    controller = _Controller(GPTInferenceWrapper(model, context), tokenizer)
    controller.sampling_rng.manual_seed(seed)
    params = SamplingParams(
        temperature=sampling.temperature or 1.0,
        top_k=sampling.top_k if sampling.temperature else 1,
        top_p=sampling.top_p,
        num_tokens_to_generate=num_tokens,
    )
    requests = OrderedDict()
    for number, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True)):
        requests[number] = InferenceRequest(
            request_id=number,
            prompt=prompt,
            prompt_tokens=ids,
            sampling_params=params,
            status=Status.ACTIVE_AND_GENERATING_TOKENS,
        )
    with InferenceMode.active():
        done = controller.generate_all_output_tokens_static_batch(requests)
    ids = [request.generated_tokens.tolist() for request in done.values()]
    return [
        Continuation(prompt, text_after(tokenizer, given, new), given, new, len(new) < num_tokens)
        for prompt, given, new in zip(prompts, prompt_ids, ids, strict=True)
    ]


def text_after(tokenizer: Tokenizer, given: Sequence[int], new: Sequence[int]) -> str:
    """The text of new tokens behind given ones, with the space between both.

    Many tokenizers drop the space before the first token that they are given. So both are decoded together, and the
    text of the given ones is taken off. If that changes within a character, the new tokens are decoded alone.
    """
    before, whole = tokenizer.detokenize(list(given)), tokenizer.detokenize([*given, *new])
    return whole.removeprefix(before) if whole.startswith(before) else tokenizer.detokenize(list(new))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``python -m air_moe_megatron.generate``."""
    group = parser.add_argument_group(title="generate")
    group.add_argument("--prompt", nargs="+", required=True, help="The texts to continue, one argument each.")
    group.add_argument("--num-tokens", type=int, default=128, help="Largest number of tokens of a continuation.")
    group.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the most probable token; above 0 samples."
    )
    group.add_argument("--top-k", type=int, default=0, help="Sample among this many most probable tokens; 0: all.")
    group.add_argument(
        "--top-p", type=float, default=0.0, help="Sample among the most probable tokens of this mass; 0: all."
    )


_LEAST_TEMPERATURE = 1e-6  # logits over smaller ones may overflow


def check(args: argparse.Namespace, tokenizer: Tokenizer) -> None:
    """Refuse what cannot be generated, before the model is built.

    Raises:
        ValueError: naming the flag, its value and the rule.
    """
    for name in _SINGLE:
        if getattr(args, name) != 1:
            raise ValueError(
                f"{flag_of(name)} ({getattr(args, name)}) must be 1: texts are continued with expert "
                "parallelism only; a checkpoint loads at any sizes"
            )
    if args.moe_expert_capacity_factor is not None:
        raise ValueError(
            f"--moe-expert-capacity-factor ({args.moe_expert_capacity_factor}) is not supported: a text would depend "
            "on the others of its batch; leave it out, and no token is dropped"
        )
    if args.num_tokens < 1:
        raise ValueError(f"--num-tokens ({args.num_tokens}) must be at least 1")
    if args.temperature != 0 and not _LEAST_TEMPERATURE <= args.temperature < math.inf:
        raise ValueError(f"--temperature ({args.temperature}) must be 0, or from {_LEAST_TEMPERATURE} on and finite")
    if not 0 <= args.top_k < tokenizer.vocab_size:
        raise ValueError(
            f"--top-k ({args.top_k}) must be from 0 to below the number of token ids, {tokenizer.vocab_size}"
        )
    if not 0 <= args.top_p <= 1:
        raise ValueError(f"--top-p ({args.top_p}) must be from 0 to 1")
    if args.top_k and args.top_p:
        raise ValueError(f"--top-k ({args.top_k}) excludes --top-p ({args.top_p}): give one of them")
    if not args.temperature and (args.top_k or args.top_p):
        raise ValueError("--top-k and --top-p need --temperature above 0: without it the most probable token is taken")
    longest = args.max_position_embeddings - args.num_tokens
    for prompt in args.prompt:
        shown = f"--prompt {prompt[:40]!r}"
        try:
            length = len(tokenizer.tokenize(prompt))
        except ValueError as error:  # of bytes too: UnicodeEncodeError
            raise ValueError(f"{shown}: {error}") from error
        if length == 0:
            raise ValueError(f"{shown} is empty: a continuation needs at least one token")
        if length > longest:
            raise ValueError(
                f"{shown} has {length} tokens, and with --num-tokens ({args.num_tokens}) more than the positions of "
                f"the model, --max-position-embeddings ({args.max_position_embeddings}): shorten one of them"
            )


def run(screen: TextIO) -> None:
    """Parse the command line, load the checkpoint, and print the continuations.

    Args:
        screen: where rank 0 prints them.
    Raises:
        SystemExit: if the command line, the checkpoint or a prompt cannot work; one line says why.
    """
    with contextlib.ExitStack() as stack:
        with console.refusals():
            command = restore.read_command_line(add_flags)
            args, ranks = restore.complete_arguments(command, ignored=_DROPPING), command.ranks
            tokenizer = tokenizer_of(args)
            check(args, tokenizer)
            stack.enter_context(process_groups_released())
            model = restore.build_and_load(args, ranks)
        sampling = Sampling(args.temperature, args.top_k, args.top_p)
        found = continue_prompts(model[0], tokenizer, args.prompt, args.num_tokens, sampling, args.seed)
        if ranks.rank == 0:
            screen.write(format_continuations(found))
            screen.flush()


def format_continuations(found: Sequence[Continuation]) -> str:
    """Format each prompt with its continuation, separated by lines of dashes."""
    texts = [f"{one.prompt}{one.text}{' [end of document]' if one.is_ended else ''}\n" for one in found]
    return f"{'-' * 40}\n".join(texts)
