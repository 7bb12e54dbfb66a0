"""Does one model answer as another does? Logits and greedy answers on a few prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from qlora_serve.adapters.files import AdapterFiles
from qlora_serve.base.tokenizer import encode_text, render_chat
from qlora_serve.errors import MergeError

GREEDY_TOKENS = 16
# Bounds on what is kept in memory: 8 prompts of 32 positions are 150 MB for 150 000 tokens.
_MAX_PROMPTS = 8
_MAX_PROMPT_TOKENS = 512
_KEPT_POSITIONS = 32

_SHIPPED_PROMPTS = (
    "What is the capital of France?",
    "Write a short, friendly reply to a customer whose parcel arrived broken.",
    "List three fruits as a JSON array.",
    "Summarise in one sentence: the meeting moved from Monday to Thursday, because the room is "
    "being painted and two colleagues are away.",
    "def fibonacci(n):",
)

OnPrompt = Callable[[int], None]


@dataclass(frozen=True)
class Probes:
    """The prompts of a proof."""

    token_ids: list[list[int]]
    origin: str
    """Where they come from, in words."""


@dataclass(frozen=True)
class Answers:
    """What a model says to the probes."""

    logits: list[Any]
    """For each prompt its last positions: [at most 32, vocabulary], float32 on the CPU."""
    greedy: list[list[int]]
    """For each prompt the most likely continuation, at most 16 tokens."""


class Comparison(BaseModel):
    """How far a model's answers are from a reference's."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    max_difference: float
    """The largest absolute difference of two logits."""
    relative_difference: float
    """The same as a share of the standard deviation of the reference's logits."""
    mean_kl: float
    """Mean Kullback-Leibler divergence of the next-token distributions, in nats."""
    top1_agreement: float
    """Share of positions with the same most likely token."""
    equal_answers: int
    """How many greedy answers are equal."""
    answers: int
    """How many greedy answers were compared."""


def choose_probes(adapter: AdapterFiles, tokenizer: Any, vocabulary: int) -> Probes:
    """The prompts that training left in the manifest, else shipped ones in the chat template.

    Raises:
        MergeError: the manifest has a token that the base's vocabulary does not have.
    """
    recorded = adapter.manifest.probes if adapter.manifest is not None else []
    recorded = [ids for ids in recorded if ids][:_MAX_PROMPTS]
    if not recorded:
        return shipped_probes(tokenizer)
    outside = [token for ids in recorded for token in ids if not 0 <= token < vocabulary]
    if outside:
        raise MergeError(
            f"adapter {adapter.path} records a probe prompt with token {outside[0]}, and the base "
            f"has {vocabulary} tokens; its qlora_serve.json belongs to another base"
        )
    rows = adapter.manifest.probes_from if adapter.manifest is not None else None
    origin = f"{rows} of the adapter's own data" if rows else "the adapter's own data"
    return Probes([ids[-_MAX_PROMPT_TOKENS:] for ids in recorded], origin)


def shipped_probes(tokenizer: Any) -> Probes:
    """The prompts that come with the tool, in a tokenizer's chat template."""
    chats = ([{"role": "user", "content": text}] for text in _SHIPPED_PROMPTS)
    texts = [render_chat(tokenizer, chat, add_generation_prompt=True) for chat in chats]
    return Probes([encode_text(tokenizer, text) for text in texts], "shipped with qlora-serve")


def follow(model: Any, probes: Probes, others: list[list[int]], on_prompt: OnPrompt) -> Answers:
    """As `ask`, without generating: would this model give the `others`' greedy answers?

    One forward pass over prompt and answer gives the most likely token at each place of it. They
    are that answer exactly when greedy decoding would write it. NF4 on a CPU unpacks every weight
    at every pass, so sixteen passes fewer are minutes.
    """
    logits, greedy = [], []
    device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        pairs = zip(probes.token_ids, others, strict=True)
        for done, (ids, answer) in enumerate(pairs, start=1):
            tokens = torch.tensor([ids + answer], device=device)  # [1, prompt + answer]
            output = model(input_ids=tokens, use_cache=False).logits[0]
            logits.append(output[: len(ids)][-_KEPT_POSITIONS:].float().cpu())
            greedy.append(output[len(ids) - 1 : -1].argmax(-1).tolist())
            on_prompt(done)
    return Answers(logits, greedy)


def ask(model: Any, probes: Probes, stop_token_ids: Sequence[int], on_prompt: OnPrompt) -> Answers:
    """Runs every probe through a model, one by one: no padding, so nothing to mask."""
    logits, greedy = [], []
    device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        for done, ids in enumerate(probes.token_ids, start=1):
            tokens = torch.tensor([ids], device=device)  # [1, tokens]
            output = model(input_ids=tokens, use_cache=False).logits[0]  # [tokens, vocabulary]
            logits.append(output[-_KEPT_POSITIONS:].float().cpu())
            greedy.append(_continue(model, tokens, list(stop_token_ids)))
            on_prompt(done)
    return Answers(logits, greedy)


def compare(reference: Answers, other: Answers) -> Comparison:
    """Compares two models' answers to the same probes."""
    expected, got = torch.cat(reference.logits), torch.cat(other.logits)  # [positions, vocabulary]
    difference = float((expected - got).abs().max())
    log_p, log_q = expected.log_softmax(-1), got.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)  # [positions]
    same = (expected.argmax(-1) == got.argmax(-1)).float()
    return Comparison(
        max_difference=difference,
        relative_difference=difference / float(expected.std()),
        # Rounding can bring an exact zero slightly below it.
        mean_kl=max(0.0, float(kl.mean())),
        top1_agreement=float(same.mean()),
        equal_answers=sum(a == b for a, b in zip(reference.greedy, other.greedy, strict=True)),
        answers=len(reference.greedy),
    )


def find_fault(merged: Comparison, base: Comparison, tolerance: float, dtype: str) -> str | None:
    """Why a merge may not be published, in words; None when it may.

    Args:
        merged: the merged model against base and adapter.
        base: the base alone against base and adapter: what the adapter does.
        tolerance: the allowed `relative_difference`.
        dtype: what the merged weights are stored in.
    """
    if not merged.relative_difference <= tolerance:  # a NaN fails too
        return (
            f"the merged model in {dtype} differs from the adapter by "
            f"{merged.relative_difference:.3g} standard deviations of the logits, more than the "
            f"tolerance of {tolerance:g}"
        )
    if not merged.mean_kl < base.mean_kl:
        return (
            f"rounding to {dtype} changes the answers more (KL {merged.mean_kl:.3g}) than the "
            f"adapter itself does (KL {base.mean_kl:.3g})"
        )
    return None


def _continue(model: Any, tokens: Any, stop_token_ids: list[int]) -> list[int]:
    output = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=GREEDY_TOKENS,
        do_sample=False,
        num_beams=1,
        # Set only to be silent: a base's own sampling settings do not matter here.
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=stop_token_ids or None,
        pad_token_id=stop_token_ids[0] if stop_token_ids else 0,
    )
    return [int(token) for token in output[0, tokens.shape[1] :]]
