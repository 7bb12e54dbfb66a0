"""Asking a model: the loss of held-out rows, and its own answers to them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from qlora_serve.train.batches import pad_rows
from qlora_serve.train.dataset import IGNORED, RowDataset
from qlora_serve.train.loss import hidden_states_at
from qlora_serve.train.masks import TokenizedRow

Advance = Callable[[int], None]


@dataclass(frozen=True)
class RowLoss:
    """The loss of one row."""

    total: float
    """Summed over its tokens that count."""
    tokens: int


@torch.no_grad()
def row_losses(
    model: Any, output_head: Any, rows: Sequence[TokenizedRow], batch: int, advance: Advance
) -> list[RowLoss]:
    """The summed cross entropy of each row's trained tokens, in float32.

    Args:
        model: a causal language model, with or without an adapter.
        output_head: its output embedding.
        rows: tokenized; each has a token that counts.
        batch: rows at a time; rows of like length go together.
        advance: is told how many rows are done.
    """
    dataset = RowDataset(rows)
    found: dict[int, RowLoss] = {}
    for indices in _batches([len(row.input_ids) for row in rows], batch):
        inputs = {
            name: tensor.to(model.device)
            for name, tensor in pad_rows([dataset[index] for index in indices]).items()
        }
        targets = inputs.pop("labels")[:, 1:]  # [rows, length-1]
        counted = targets != IGNORED
        with hidden_states_at(output_head, counted):
            logits = model(**inputs, use_cache=False).logits[0]  # [counted tokens, vocabulary]
        wanted = targets[counted]
        losses = functional.cross_entropy(logits.float(), wanted, reduction="none").double()
        counts = counted.sum(dim=1).tolist()
        for index, part in zip(indices, losses.split(counts), strict=True):
            found[index] = RowLoss(float(part.sum()), len(part))
        advance(len(found))
    return [found[index] for index in range(len(rows))]


@torch.no_grad()
def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    stop_ids: Sequence[int],
    max_tokens: int,
    batch: int,
    advance: Advance,
) -> list[str]:
    """The most likely answer to each prompt, token by token.

    The base's own generation config is left out: a repetition penalty in it (as Qwen2.5 has) would
    make the answers something else than the model's.
    """
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
    config = GenerationConfig(
        max_new_tokens=max_tokens, do_sample=False, eos_token_id=list(stop_ids), pad_token_id=pad
    )
    found: dict[int, str] = {}
    for indices in _batches([len(prompt) for prompt in prompts], batch):
        longest = max(len(prompts[index]) for index in indices)
        ids = torch.full((len(indices), longest), pad)
        mask = torch.zeros_like(ids)
        for place, index in enumerate(indices):  # padded on the left: answers follow on the right
            ids[place, longest - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[place, longest - len(prompts[index]) :] = 1
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
        )
        for index, row in zip(indices, output[:, longest:].tolist(), strict=True):
            found[index] = tokenizer.decode(_until(row, stop_ids), skip_special_tokens=True)
        advance(len(found))
    return [found[index] for index in range(len(prompts))]


def _until(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    """The tokens before the first that stops."""
    end = next((i for i, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return tokens[:end]


def _batches(lengths: list[int], size: int) -> list[list[int]]:
    """Indices in batches of like length, the longest first: memory is short at once or never."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + size] for start in range(0, len(order), size)]
