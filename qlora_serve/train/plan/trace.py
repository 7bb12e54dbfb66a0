"""How much memory a step takes, by running it on tensors that hold nothing.

A formula for activations (such as that of arXiv:2205.05198) knows one architecture, one attention
and no adapter. Here the model's own forward and backward pass run under torch's FakeTensorMode,
which computes shapes and no numbers, while every storage is counted from its birth to its death. So
GQA, gated MLPs, LoRA's extra tensors, gradient checkpointing, masks and the choice of attention
kernel are what they will be. What happens inside a kernel (work space) is not seen.
"""

import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_serve.errors import BaseModelError
from qlora_serve.train.fast_lora import fast_lora
from qlora_serve.train.plan.weights import Scheme, is_quantized
from qlora_serve.train.row_attention import RowAttention


@dataclass(frozen=True)
class Step:
    """A forward pass, or a forward and backward pass, whose memory is wanted."""

    rows: int
    length: int
    logits: int
    """Positions at which logits are computed."""
    dtype: str
    """What is computed in."""
    autocast: bool = False
    """Whether the trainer mixes precisions, as it does on a GPU below float32."""
    keeps_gradients: bool = False
    """Whether gradients of an earlier micro-batch are there already."""
    is_flat: bool = False
    """Whether rows lie in one line, each attending to itself, as training does on a CPU."""
    whole_logits: bool = False
    """Whether the model computes all logits itself, as where its head is split over processes."""


class Ledger(TorchDispatchMode):
    """Counts the bytes of every storage that is made while it is active, until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def know(self, tensor: torch.Tensor) -> None:
        """Leaves a tensor's storage out of the account: it was there before."""
        self._sizes[id(tensor.untyped_storage())] = 0

    def know_all(self, model: Any) -> None:
        """Leaves out all that a model holds."""
        for tensor in (*model.parameters(), *model.buffers()):
            self.know(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator, and enters what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._enter(leaf.untyped_storage())
        return result

    def _enter(self, storage: Any) -> None:
        key = id(storage)
        if key in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


def training_peak(model: Any, step: Step, how: Scheme) -> int:
    """Peak bytes of a training step above weights and optimizer: activations and gradients.

    Args:
        model: a PEFT model (or a base that is trained whole), whose tensors are replaced.
        step: its shapes.
        how: how the base's linear layers are stored.

    Raises:
        BaseModelError: the model's forward pass needs the tensors' contents.
    """
    with _emptied(model, how, step, trains=True) as ledger:
        inputs, positions = _inputs(step)
        with ledger:
            if step.keeps_gradients:
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.grad = torch.zeros_like(parameter)
            _forward_and_backward(model, step, inputs, positions)
    return ledger.peak


def _forward_and_backward(
    model: Any, step: Step, inputs: dict[str, Any], positions: torch.Tensor
) -> None:
    """As `train.loss` does it: the head a chunk at a time, where it is an ordinary layer."""
    from qlora_serve.train.loss import HeadForm, _HeadLoss, summed_cross_entropy

    head = plain_model(model).get_output_embeddings()
    targets = torch.zeros(step.logits, dtype=torch.long)
    with torch.autocast("cpu", getattr(torch, step.dtype), enabled=step.autocast):
        if type(head) is torch.nn.Linear and not step.whole_logits:
            config = plain_model(model).config.get_text_config()
            form = HeadForm(cap=getattr(config, "final_logit_softcapping", None))
            hidden = _hidden(model, inputs, positions)
            loss = _HeadLoss.apply(hidden, head.weight, head.bias, targets, form)
            del hidden
        else:
            logits = _logits(model, inputs, positions)
            loss = summed_cross_entropy(logits.float()[0], targets)
            del logits
    loss.backward()


def _hidden(model: Any, inputs: dict[str, Any], positions: torch.Tensor) -> torch.Tensor:
    """The hidden states [positions, hidden] that the output head would get."""
    taken: list[torch.Tensor] = []

    def take(_: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        chosen = arguments[0].flatten(0, 1)[positions]
        taken.append(chosen)
        return (chosen[None, :0], *arguments[1:])

    handle = plain_model(model).get_output_embeddings().register_forward_pre_hook(take)
    try:
        model(**inputs)
    finally:
        handle.remove()
    return taken.pop()


def piece_rows(rows: int, length: int, lean: bool) -> tuple[int, int]:
    """The rows of the largest piece of a line of rows, and how many pieces there are."""
    from qlora_serve.train.layout import even_pieces, piece_tokens

    spans = [(row * length, (row + 1) * length) for row in range(rows)]
    pieces = even_pieces(spans, piece_tokens(lean))
    return max(last - first for first, last in pieces) // length, len(pieces)


def serving_peak(model: Any, step: Step, how: Scheme) -> int:
    """Peak bytes of one serving step above weights and KV cache.

    Raises:
        BaseModelError: as for `training_peak`.
    """
    with _emptied(model, how, step, trains=False) as ledger:
        inputs, positions = _inputs(step)
        with ledger, torch.no_grad():
            _logits(model, inputs, positions).float()
    return ledger.peak


def _inputs(step: Step) -> tuple[dict[str, Any], torch.Tensor]:
    inputs: dict[str, Any] = {
        "input_ids": torch.zeros(step.rows, step.length, dtype=torch.long),
        "use_cache": False,
    }
    if step.is_flat:
        tokens = step.rows * step.length
        inputs["input_ids"] = torch.zeros(1, tokens, dtype=torch.long)
        inputs["position_ids"] = torch.zeros(1, tokens, dtype=torch.long)
    elif step.rows > 1:  # rows of several lengths are padded, and then there is a mask
        shape = (step.rows, 1, step.length, step.length)
        inputs["attention_mask"] = torch.ones(shape, dtype=torch.bool)
    return inputs, torch.zeros(step.logits, dtype=torch.long)


def _logits(model: Any, inputs: dict[str, Any], positions: torch.Tensor) -> torch.Tensor:
    """Logits [1, positions, vocabulary], as `train.loss` has them: at some positions only."""

    def select(_: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = arguments[0]  # [rows, length, hidden]
        return (hidden.flatten(0, 1)[positions].unsqueeze(0), *arguments[1:])

    handle = plain_model(model).get_output_embeddings().register_forward_pre_hook(select)
    try:
        logits: torch.Tensor = model(**inputs).logits
        return logits
    finally:
        handle.remove()


def plain_model(model: Any) -> Any:
    """The transformers model in a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _emptied(model: Any, how: Scheme, step: Step, trains: bool) -> Iterator[Ledger]:
    """Runs under FakeTensorMode with a model whose tensors have shapes and no content."""
    ledger = Ledger()
    model.train(trains)
    try:
        with warnings.catch_warnings(), ExitStack() as stack:
            warnings.simplefilter("ignore")
            if step.is_flat:
                places = torch.arange(step.length).repeat(step.rows)[None]
                stack.enter_context(RowAttention(plain_model(model)).over(places))
            stack.enter_context(FakeTensorMode())
            _empty(model, how, step, ledger, trains)
            if step.is_flat:
                stack.enter_context(fast_lora(model))
            yield ledger
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        kind = type(plain_model(model)).__name__
        raise BaseModelError(
            f"a step of {kind} cannot be planned without its weights: {reason}"
        ) from error


def _empty(model: Any, how: Scheme, step: Step, ledger: Ledger, trains: bool) -> None:
    """Replaces every parameter and buffer by a fake one of the dtype that it will have."""
    head = plain_model(model).get_output_embeddings()
    dtype = getattr(torch, step.dtype)
    # What PEFT's prepare_model_for_kbit_training does to all that is not quantized.
    unquantized = torch.float32 if trains and how.kind not in ("none", "gptq") else dtype
    replaced: dict[int, Any] = {}
    for module in model.modules():
        module.__dict__.pop("forward", None)
        quantized = is_quantized(module, head, how) and not _is_adapter(module)
        for name, old in list(module.named_parameters(recurse=False)):
            if id(old) not in replaced:
                kept = torch.float32 if trains and old.requires_grad else unquantized
                data = torch.empty(old.shape, dtype=dtype if quantized else kept)
                ledger.know(data)
                replaced[id(old)] = torch.nn.Parameter(data, requires_grad=old.requires_grad)
            setattr(module, name, replaced[id(old)])
        for name, old in list(module.named_buffers(recurse=False)):
            buffer = torch.empty(old.shape, dtype=old.dtype)
            ledger.know(buffer)
            setattr(module, name, buffer)
        if quantized:
            module.forward = _quantized_forward(module)


def _is_adapter(module: Any) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _quantized_forward(module: Any) -> Any:
    """A linear layer that is dequantized when it is used, and again in the backward pass."""

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        result = _Dequantized.apply(hidden.to(module.weight.dtype), module.weight)
        if module.bias is not None:
            result = result + module.bias.to(result.dtype)
        return result.to(hidden.dtype)

    return forward


class _Dequantized(torch.autograd.Function):
    """The memory of bitsandbytes' MatMul4Bit: a full-width copy of the weight, kept by nobody."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        return torch.nn.functional.linear(hidden, weight.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] @ ctx.weight.clone(), None
