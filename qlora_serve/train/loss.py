"""The loss, with logits at the positions that need them and nowhere else.

Logits are the largest tensor of a training step: [tokens, vocabulary]. In chats most tokens belong
to prompts, which do not count in the loss, so that computing their logits is wasted time and
memory. Selecting the hidden states right before the output head, rather than in a forward pass of
our own, leaves all that a model does to its logits (scaling, soft-capping) to the model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from qlora_serve.train.dataset import IGNORED

# Above this many rows the softmax is recomputed in the backward pass, a chunk at a time.
_CHUNK_ROWS = 1024


def trained_positions_loss(
    model: Any, output_head: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor
) -> torch.Tensor:
    """The summed cross entropy of the labelled tokens, in float32.

    Args:
        model: the causal language model.
        output_head: its output embedding, which maps [..., hidden] to [..., vocabulary].
        inputs: input_ids and attention_mask, [rows, length].
        labels: [rows, length]; `IGNORED` where a token does not count. The label at position t is
            predicted at position t-1.
    """
    targets = labels[:, 1:]  # [rows, length-1]
    counted = targets != IGNORED
    with hidden_states_at(output_head, counted):
        logits = model(**inputs, use_cache=False).logits  # [1, counted tokens, vocabulary]
    return summed_cross_entropy(logits[0], targets[counted].to(logits.device))


@contextmanager
def hidden_states_at(output_head: Any, counted: torch.Tensor) -> Iterator[None]:
    """Lets only the hidden states at `counted` [rows, length-1] reach the output head."""

    def select(_: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = arguments[0]  # [rows, length, hidden]
        chosen = hidden[:, :-1][counted.to(hidden.device)].unsqueeze(0)
        return (chosen, *arguments[1:])

    handle = output_head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy in float32, summed over tokens.

    Args:
        logits: [tokens, vocabulary]
        targets: [tokens]
    """
    if len(targets) <= _CHUNK_ROWS:
        return _cross_entropy(logits, targets)
    total = logits.new_zeros((), dtype=torch.float32)
    for part, wanted in zip(logits.split(_CHUNK_ROWS), targets.split(_CHUNK_ROWS), strict=True):
        total = total + checkpoint(_cross_entropy, part, wanted, use_reentrant=False)
    return total


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.float(), targets, reduction="sum")
