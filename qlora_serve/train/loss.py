"""The loss, with logits at the positions that need them, a chunk at a time.

Logits are the largest tensor of a training step: [tokens, vocabulary]. In chats most tokens belong
to prompts, which do not count in the loss, so that computing their logits is wasted time and
memory. A hook selects the hidden states right before the output head; the model's own forward does
the rest.

Where the head is an ordinary layer, even the logits that count never exist whole: the head, the
softmax and the gradient of the hidden states are computed chunk by chunk in the forward pass, so
that the backward pass has nothing left to do and nothing is computed twice. What a model does to
its logits (scaling, soft-capping) is found out by trying; a model that does something else keeps
its own way, with the logits of the counted tokens whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from qlora_serve.base.matmul import linear, product
from qlora_serve.train.dataset import IGNORED

# Above this many rows the softmax is recomputed in the backward pass, a chunk at a time.
_CHUNK_ROWS = 1024
# The logits of one chunk, in bytes of float32: near the processor's caches, and below the size from
# which the C library asks the system for new pages each time (32 MiB).
_CHUNK_BYTES = 16 * 2**20
_PROBE_LENGTH = 8


@dataclass(frozen=True)
class HeadForm:
    """What a model makes of its head's output h: cap * tanh(scale * h / cap), or scale * h."""

    scale: float = 1.0
    cap: float | None = None

    def apply(self, raw: Tensor) -> Tensor:
        """The logits, in float32."""
        logits = raw.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def backward_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Turns the gradient of the logits into that of the head's output, in place."""
        if self.cap is not None:
            gradient *= 1 - (logits / self.cap).square_()
        return gradient.mul_(self.scale) if self.scale != 1.0 else gradient


def find_head_form(model: Any, output_head: Any) -> HeadForm | None:
    """How a model's logits follow from its head, found out on a few tokens; None if not known.

    Args:
        model: the causal language model.
        output_head: its output embedding. Only a plain linear layer has a form: not one that is
            quantized, carries an adapter, or lies in pieces on several devices.
    """
    if type(output_head) is not torch.nn.Linear or hasattr(output_head.weight, "ds_id"):
        return None
    config: Any = model.config.get_text_config()
    forms = [HeadForm()]
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        forms.append(HeadForm(cap=float(cap)))
    if getattr(config, "logit_scale", None):
        forms.append(HeadForm(scale=float(config.logit_scale)))
    if getattr(config, "logits_scaling", None):
        forms.append(HeadForm(scale=1 / float(config.logits_scaling)))
    seen: list[Tensor] = []
    handle = output_head.register_forward_hook(lambda _, __, output: seen.append(output))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            ids = torch.arange(_PROBE_LENGTH, device=output_head.weight.device)[None]
            logits = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        handle.remove()
        model.train(was_training)
    if len(seen) != 1 or seen[0].shape != logits.shape:
        return None
    tolerance = 1e-5 if seen[0].dtype == torch.float32 else 1e-2
    limit = tolerance * float(logits.abs().max())
    for form in forms:
        if float((form.apply(seen[0]) - logits).abs().max()) <= limit:
            return form
    return None


def trained_positions_loss(
    model: Any,
    output_head: Any,
    inputs: dict[str, Tensor],
    labels: Tensor,
    form: HeadForm | None = None,
) -> Tensor:
    """The summed cross entropy of the labelled tokens, in float32.

    Args:
        model: the causal language model.
        output_head: its output embedding, which maps [..., hidden] to [..., vocabulary].
        inputs: input_ids and attention_mask or position_ids, [rows, length].
        labels: [rows, length]; `IGNORED` where a token does not count. The label at position t is
            predicted at position t-1.
        form: see `find_head_form`; with None the model computes its logits itself.
    """
    targets = labels[:, 1:]  # [rows, length-1]
    counted = targets != IGNORED
    wanted = targets[counted]
    if form is None:
        with hidden_states_at(output_head, counted):
            logits = model(**inputs, use_cache=False).logits  # [1, counted tokens, vocabulary]
        return summed_cross_entropy(logits[0], wanted.to(logits.device))
    with hidden_states_at(output_head, counted, take=True) as taken:
        model(**inputs, use_cache=False)
    hidden = taken[0]  # [counted tokens, hidden]
    weight, bias = output_head.weight, output_head.bias
    loss: Tensor = _HeadLoss.apply(hidden, weight, bias, wanted.to(hidden.device), form)
    return loss


@contextmanager
def hidden_states_at(
    output_head: Any, counted: Tensor, take: bool = False
) -> Iterator[list[Tensor]]:
    """Lets only the hidden states at `counted` [rows, length-1] reach the output head.

    Args:
        output_head: the layer whose input is cut down.
        counted: where hidden states are wanted.
        take: let none reach it, and put them, [counted tokens, hidden], into the list instead.
    """
    taken: list[Tensor] = []

    def select(_: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = arguments[0]  # [rows, length, hidden]
        chosen = hidden[:, :-1][counted.to(hidden.device)].unsqueeze(0)
        if take:
            taken.append(chosen[0])
            chosen = chosen[:, :0]
        return (chosen, *arguments[1:])

    handle = output_head.register_forward_pre_hook(select)
    try:
        yield taken
    finally:
        handle.remove()


class _HeadLoss(torch.autograd.Function):
    """Output head and summed cross entropy, with the gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [tokens, hidden]
        weight: Tensor,  # [vocabulary, hidden]
        bias: Tensor | None,  # [vocabulary]
        targets: Tensor,  # [tokens]
        form: HeadForm,
    ) -> Tensor:
        needs = ctx.needs_input_grad
        rows = max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_gradient = torch.empty_like(hidden) if needs[0] else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
        bias_gradient = torch.zeros_like(bias, dtype=torch.float32) if needs[2] else None  # type: ignore[arg-type]
        for first in range(0, len(targets), rows):
            part, wanted = hidden[first : first + rows], targets[first : first + rows]
            logits = form.apply(linear(part, weight, bias))  # [rows, vocabulary]
            chosen, top = logits.gather(1, wanted[:, None]), logits.amax(1, keepdim=True)
            # In place where nothing else needs the logits: this is the largest tensor of a step.
            # torch's logsumexp would make another one of its size.
            source = logits if form.cap is None else logits.clone()
            gradient = source.sub_(top).exp_()
            sums = gradient.sum(1, keepdim=True)
            total += (sums.log() + top - chosen).sum()
            if not any(needs):
                continue
            gradient /= sums
            gradient.scatter_add_(1, wanted[:, None], gradient.new_full((len(wanted), 1), -1.0))
            gradient = form.backward_(gradient, logits).to(weight.dtype)
            if hidden_gradient is not None:
                hidden_gradient[first : first + rows] = product(gradient, weight)
            if weight_gradient is not None:
                weight_gradient += product(gradient.T, part)
            if bias_gradient is not None:
                bias_gradient += gradient.sum(0)
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        made = [None if g is None else (g * outputs[0]).to(dtype) for g, dtype in pairs]
        return (*made, None, None)


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
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


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), targets, reduction="sum")
