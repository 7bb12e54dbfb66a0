"""What is trained, gathered from wherever it lies, to disk and back."""

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qlora_serve.adapters.files import WEIGHTS_FILE
from qlora_serve.errors import TrainError
from qlora_serve.train.parallel import is_main, is_part

TRAINED_FILE = "trained.safetensors"
"""In a checkpoint whose adapter was converted: the tensors as they are being trained."""
GREW = "qlora_serve_grew"
"""The attribute of a base whose embeddings were enlarged for new tokens."""


def trained_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter that is to be saved by its name, whole, on the CPU.

    These are the trainable ones and, where the vocabulary grew, the embeddings.

    Under ZeRO-3 a parameter is an empty tensor between the steps, each process holding a part of
    it elsewhere, and under FSDP it is a part; all processes must call this.
    """
    found = {}
    grown = _grown_embeddings(model)
    # Shared parameters too: PEFT looks for each of its modules under its own name.
    for name, parameter in model.named_parameters(remove_duplicate=not is_adapter(model)):
        if parameter.requires_grad or name in grown:
            with _whole(parameter):
                tensor = parameter.detach()
                tensor = tensor.full_tensor() if is_part(tensor) else tensor
                found[name] = tensor.to("cpu", copy=True).contiguous()
    return found


def _grown_embeddings(model: Any) -> set[str]:
    """What an adapter holds besides its trained rows where the vocabulary grew: embedding and
    output head whole, once where they are tied, unless they are trained whole anyway."""
    if not is_adapter(model) or not getattr(model.get_base_model(), GREW, False):
        return set()
    base = model.get_base_model()
    layers = (base.get_input_embeddings(), base.get_output_embeddings())
    found, seen = set(), set()
    for layer in layers:
        for path, parameter in model.named_parameters(remove_duplicate=False):
            is_within = any(parameter is own for own in layer.parameters())
            if is_within and not parameter.requires_grad and id(parameter) not in seen:
                found.add(path)
                seen.add(id(parameter))
    return {path for path in found if ".original_module." not in path}


def is_adapter(model: Any) -> bool:
    """Whether an adapter is trained, not a whole model."""
    return hasattr(model, "peft_config")


def put_tensors(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Writes trainable parameters back; the reverse of `trained_tensors`.

    Raises:
        TrainError: a parameter is missing, or has another shape.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if name not in tensors or tensors[name].shape != shape:
            raise TrainError(f"the checkpoint does not fit this run: {name} is not in it")
        with _whole(parameter, writer=0), torch.no_grad():
            if is_part(parameter):
                _put_part(parameter, tensors[name])
            elif parameter.shape == shape:
                parameter.copy_(tensors[name])


def _put_part(parameter: Any, whole: torch.Tensor) -> None:
    """Writes this process's part of a tensor that every process holds whole."""
    from torch.distributed.tensor import distribute_tensor

    whole = whole.to(parameter.device, parameter.dtype)
    parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))


@contextlib.contextmanager
def _whole(parameter: torch.nn.Parameter, writer: int | None = None) -> Iterator[None]:
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=writer):
        yield


def adapter_tensors(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the trained tensors, what PEFT saves, under the names that PEFT gives it."""
    from peft import get_peft_model_state_dict

    state: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, state_dict=tensors, save_embedding_layers=bool(_grown_embeddings(model))
    )
    return state


def save_adapter(model: Any, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a PEFT model's adapter, its config and its tensors, from the main process.

    An adapter that began as a part of the base's own weights (PiSSA, OLoRA) is converted to one
    that fits the base as it was: twice the rank, with the start subtracted. PEFT does that.

    Args:
        model: the PEFT model.
        folder: where to.
        tensors: see `trained_tensors`.
    """
    if not is_main():
        return
    start = _start_of(model)
    # Converting, PEFT looks for the start in the same tensors as for the rest: the model's own.
    options: dict[str, Any] = (
        {"state_dict": tensors}
        if start is None
        else {"path_initial_model_for_weight_conversion": str(start)}
    )
    # PEFT loads the start as a second adapter, which draws random numbers.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that PiSSA changes the base: this is what is undone here
        # Left to itself, PEFT may ask a hub whether the base's vocabulary was enlarged.
        model.save_pretrained(
            folder,
            safe_serialization=True,
            save_embedding_layers=bool(_grown_embeddings(model)),
            **options,
        )
    # PEFT's card is a form full of gaps.
    (folder / "README.md").unlink(missing_ok=True)


def is_converted(model: Any) -> bool:
    """Whether the saved adapter is another than the trained one."""
    return _start_of(model) is not None


def keep_start(model: Any, folder: Path) -> None:
    """Remembers an adapter as it begins, for the conversion in `save_adapter`.

    Args:
        model: a PEFT model whose start has changed the base's weights.
        folder: an empty directory that outlives the run.
    """
    config = model.peft_config["default"]
    method, config.init_lora_weights = config.init_lora_weights, True
    try:
        model.save_pretrained(folder, save_embedding_layers=False)
    finally:
        config.init_lora_weights = method
    model.qlora_serve_start = folder


def _start_of(model: Any) -> Path | None:
    return getattr(model, "qlora_serve_start", None)


def load_adapter_tensors(model: Any, folder: Path) -> None:
    """Puts a checkpoint's tensors into a PEFT model that was built like the saved one."""
    from safetensors.torch import load_file

    raw = folder / TRAINED_FILE
    if raw.is_file():
        put_tensors(model, load_file(raw))
        return
    saved = load_file(folder / WEIGHTS_FILE)
    named = model.named_parameters(remove_duplicate=False)
    markers = {name: torch.empty(0) for name, p in named if p.requires_grad}
    pairs = _names(model, markers)
    put_tensors(model, {name: saved[shown] for shown, name in pairs.items() if shown in saved})


def _names(model: Any, markers: dict[str, torch.Tensor]) -> dict[str, str]:
    """PEFT's name of each saved tensor → the parameter's own."""
    identities = {id(tensor): name for name, tensor in markers.items()}
    return {
        shown: identities[id(tensor)]
        for shown, tensor in adapter_tensors(model, markers).items()
        if id(tensor) in identities
    }


def save_model(model: Any, folder: Path, tensors: dict[str, torch.Tensor], dtype: str) -> None:
    """Writes a fully trained model, its config and its tensors, from the main process."""
    if not is_main():
        return
    wanted = getattr(torch, dtype)
    state = {name: tensor.to(wanted) for name, tensor in tensors.items()}
    model.save_pretrained(folder, state_dict=state, safe_serialization=True)
    # transformers writes the dtype of the weights in memory, which are float32.
    config = folder / "config.json"
    content = json.loads(config.read_text(encoding="utf-8")) | {"dtype": dtype}
    config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_model_tensors(model: Any, folder: Path) -> None:
    """Puts a checkpoint's tensors into a model that is trained whole."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    put_tensors(model, tensors)
