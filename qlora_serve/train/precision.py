"""Trained parameters in float32 within a base that computes in fewer bits.

A step of a usual size is lost in bfloat16: its neighbours of 1 are 0.008 away. So what is trained
is float32. LoRA layers cast their own inputs; modules that are trained whole and trained biases
are fitted in here, for training, sampling and checks alike, so that no caller needs autocast and
the hidden states keep the base's dtype, as when the adapter is served.
"""

from typing import Any

import torch
from torch import nn


def train_in_float32(model: Any, dtype: torch.dtype) -> None:
    """Makes all trained parameters float32, and lets the model compute with them.

    Args:
        model: a PEFT model.
        dtype: what its base computes in.
    """
    from peft.utils.other import ModulesToSaveWrapper

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    if dtype == torch.float32:
        return
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        if isinstance(module, ModulesToSaveWrapper):
            copy: Any = module.modules_to_save["default"]
            copy.register_forward_pre_hook(_take_own_dtype)
            # Logits may stay as exact as they are.
            if module is not head and copy is not head:
                copy.register_forward_hook(_Give(dtype))
        elif _has_trained_bias(module):
            _lower_bias(module, dtype)


def _take_own_dtype(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(
        item.to(dtype) if isinstance(item, torch.Tensor) and item.is_floating_point() else item
        for item in arguments
    )


class _Give:
    """A hook that gives a module's output the base's dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __call__(self, _: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output.to(self._dtype)


def _has_trained_bias(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return [name for name, parameter in own.items() if parameter.requires_grad] == ["bias"]


def _lower_bias(module: nn.Module, dtype: torch.dtype) -> None:
    """Lends a module its bias in another dtype while it computes."""
    kept: list[nn.Parameter] = []

    def lend(_: nn.Module, __: Any) -> None:
        bias: Any = module._parameters.pop("bias")
        kept.append(bias)
        object.__setattr__(module, "bias", bias.to(dtype))

    def restore(*_: Any) -> None:
        object.__delattr__(module, "bias")
        module._parameters["bias"] = kept.pop()

    module.register_forward_pre_hook(lend)
    module.register_forward_hook(restore, always_call=True)
