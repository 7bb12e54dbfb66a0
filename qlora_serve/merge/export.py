"""Writing a merged model as an ordinary model directory."""

import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from qlora_serve.base.load import quiet_transformers
from qlora_serve.base.source import BaseSource
from qlora_serve.errors import MergeError, OutputError

_GIB = 2**30
# Config, tokenizer and file headers beside the weights.
_SPARE_BYTES = 32 * 2**20


def require_space(folder: Path, weights: int, dtype: str) -> None:
    """Checks that the disk has room for the weights, before an hour is spent on writing them.

    Args:
        folder: on that disk.
        weights: how many numbers there are.
        dtype: what each is stored in.

    Raises:
        OutputError: it has not; the message has both sizes.
    """
    itemsize: int = getattr(torch, dtype).itemsize
    needed = weights * itemsize + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"the disk of {folder} has {free / _GIB:.2f} GiB free and the merged model needs "
            f"{needed / _GIB:.2f} GiB; free some space or name another --output"
        )


def cast_weights(model: Any, dtype: str) -> None:
    """Casts every weight once, in place.

    Raises:
        MergeError: a value does not fit into the dtype.
    """
    wanted = getattr(torch, dtype)
    for name, parameter in model.named_parameters():
        cast = parameter.detach().to(wanted)
        if not bool(cast.isfinite().all()):
            raise MergeError(
                f"{name} has values that do not fit into {dtype} (largest "
                f"{float(parameter.abs().max()):.4g}); use --dtype bfloat16 or float32"
            )
        parameter.data = cast


def write_model(
    folder: Path, model: Any, tokenizer: Any, stop_token_ids: Iterable[int], max_shard_size: str
) -> None:
    """Writes config, safetensors shards, tokenizer, chat template and generation config.

    Args:
        folder: an existing, empty directory.
        model: with weights already in the dtype that they are stored in.
        tokenizer: with its chat template.
        stop_token_ids: every token at which an answer ends.
        max_shard_size: the largest weights file, such as 2GB.
    """
    _set_generation_config(model, tokenizer, stop_token_ids)
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)


def write_surroundings(
    folder: Path, source: BaseSource, model: Any, tokenizer: Any, stop_token_ids: Iterable[int]
) -> None:
    """As `write_model`, but for the weights, which are there already.

    Args:
        folder: where the weights are.
        source: the base, whose generation config is carried over.
        model: without weights; its config is written.
        tokenizer: with its chat template.
        stop_token_ids: every token at which an answer ends.
    """
    from transformers import GenerationConfig

    if (source.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.path)
    _set_generation_config(model, tokenizer, stop_token_ids)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def count_weights(model: Any) -> int:
    """How many numbers a model's parameters hold; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _set_generation_config(model: Any, tokenizer: Any, stop_token_ids: Iterable[int]) -> None:
    config = model.generation_config
    stops = sorted(stop_token_ids)
    if stops:
        config.eos_token_id = stops[0] if len(stops) == 1 else stops
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config.validate(strict=True)
    except ValueError:
        # Published bases set a temperature and forget do_sample; transformers loads such a config
        # with a warning, and refuses to save it.
        config.do_sample = True
