"""Quantizing a base with GPTQ (arXiv:2210.17323), by gptqmodel and optimum's loop over layers."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from qlora_serve.base.gptq import import_gptqmodel, silence
from qlora_serve.base.tokenizer import encode_text, render_chat
from qlora_serve.errors import BaseModelError, ConfigError

CALIBRATION_FILE = Path(__file__).with_name("calibration.jsonl")
"""Chats written for this project: questions, code, lists, letters, several languages."""

# As in the paper: 128 rows of 2048 tokens.
_MOST_TOKENS = 128 * 2048
_ROW_TOKENS = 2048


@dataclass(frozen=True)
class GptqSettings:
    """How a base is quantized with GPTQ."""

    bits: int = 4
    """2, 3, 4 or 8."""
    group_size: int = 128
    """Inputs that share a scale and a zero point; -1 for all inputs of a layer."""
    symmetric: bool = True
    """Whether the zero point is the middle code, rather than a number of each group's own."""
    by_activity: bool = False
    """Whether inputs are quantized in the order of their activity (`desc_act`): more exact, and
    slower to compute with."""
    calibration: Path = CALIBRATION_FILE
    """A JSONL file of `{"messages": [...]}` or `{"text": "..."}`."""

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ConfigError(f"--gptq-bits {self.bits}: expected 2, 3, 4 or 8")
        if self.group_size != -1 and self.group_size not in (16, 32, 64, 128, 256, 512, 1024):
            raise ConfigError(
                f"--gptq-group-size {self.group_size}: expected -1, or a power of two from 16 to "
                "1024"
            )


def quantize_model(
    model: Any,
    settings: GptqSettings,
    rows: list[list[int]],
    done: Callable[[int], None] = lambda layers: None,
) -> Any:
    """Quantizes the linear layers of a float model's blocks, in place; the output layer stays.

    Args:
        model: a transformers model.
        settings: how.
        rows: token ids to calibrate with.
        done: is told the number of layers that are done.

    Returns:
        The model, ready for `save_model`.

    Raises:
        BaseModelError: gptqmodel cannot quantize it.
    """
    import_gptqmodel()
    import torch
    from gptqmodel.utils.model import hf_convert_gptq_v2_to_v1_format
    from optimum.gptq import GPTQQuantizer

    tokens = [torch.tensor([row]) for row in rows]
    quantizer = GPTQQuantizer(
        bits=settings.bits,
        group_size=settings.group_size,
        sym=settings.symmetric,
        desc_act=settings.by_activity,
        act_group_aware=not settings.by_activity and settings.group_size > 0,
        dataset=[{"input_ids": t, "attention_mask": torch.ones_like(t)} for t in tokens],
        backend="gptq_torch",
        pad_token_id=0,  # asked for, and unused: rows run one at a time
    )
    try:
        with silence(), _progress_of_optimum(done):
            model = quantizer.quantize_model(model)
            # The older layout, which every reader knows, holds the middle code as well as the new.
            _, is_older = hf_convert_gptq_v2_to_v1_format(
                model, quantizer.sym, quantizer.bits, quantizer.quant_linear, "gptq_v2", None
            )
    except (ValueError, RuntimeError, NotImplementedError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BaseModelError(f"gptqmodel cannot quantize this model: {reason}") from error
    quantizer.dataset = None
    quantizer.format = "gptq" if is_older else "gptq_v2"
    model.config.quantization_config = quantizer.to_dict() | {
        "checkpoint_format": quantizer.format,
        "quant_method": "gptq",
    }
    return model


def count_layers(model: Any) -> int:
    """The linear layers that `quantize_model` quantizes: all but the output."""
    from torch.nn import Linear

    output = model.get_output_embeddings()
    return sum(isinstance(m, Linear) and m is not output for m in model.modules())


def save_model(model: Any, folder: Path) -> None:
    """Writes a model of `quantize_model`, as transformers and as AutoGPTQ's readers expect it."""
    with silence():
        model.save_pretrained(folder)
    settings = model.config.quantization_config
    (folder / "quantize_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def calibration_rows(file: Path, tokenizer: Any, longest: int) -> list[list[int]]:
    """Token ids of a calibration file, its chats rendered with the base's template, in long rows.

    The file's rows are laid end to end. At the first token of whatever a model reads, some layers'
    inputs are dozens of times as large as at any other (arXiv:2402.17762: 2400 against 50 in
    SmolLM2), and GPTQ minimises a sum of squares: in rows of a chat each, the first tokens would
    outweigh all others thirty to one, which quantizes those layers worse than rounding does.

    Args:
        file: rows of `{"messages": [...]}` or `{"text": "..."}`; what is beyond 262,144 tokens is
            not used.
        tokenizer: the base's.
        longest: the tokens that the base reads at once.

    Raises:
        ConfigError: the file cannot be read; names the line.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the calibration file {file}: {error}") from None
    tokens: list[int] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and len(tokens) < _MOST_TOKENS:
            tokens += encode_text(tokenizer, _text(line, tokenizer, f"{file}:{number}"))
    if not tokens:
        raise ConfigError(f"the calibration file {file} holds no rows")
    tokens = tokens[:_MOST_TOKENS]
    rows = ceil(len(tokens) / min(longest, _ROW_TOKENS))
    size = ceil(len(tokens) / rows)  # alike: a short rest would be mostly its first token
    return [tokens[first : first + size] for first in range(0, len(tokens), size)]


def _text(line: str, tokenizer: Any, place: str) -> str:
    try:
        row = json.loads(line)
        if isinstance(row.get("text"), str):
            return str(row["text"])
        return render_chat(tokenizer, row["messages"])
    except (ValueError, AttributeError, KeyError, TypeError):
        raise ConfigError(
            f'{place}: expected {{"messages": [...]}} or {{"text": "..."}}, a line'
        ) from None
    except BaseModelError as error:
        raise ConfigError(f"{place}: {error}") from None


@contextmanager
def _progress_of_optimum(done: Callable[[int], None]) -> Iterator[None]:
    """Turns optimum's own bars, one a block and one a layer, into calls of `done`."""
    from optimum.gptq import quantizer

    original, count = quantizer.tqdm, 0

    def watched(items: Iterable[Any], desc: str = "", **_: Any) -> Iterator[Any]:
        nonlocal count
        for item in items:
            yield item
            if "layers inside" in desc:
                count += 1
                done(count)

    quantizer.tqdm = watched
    try:
        yield
    finally:
        quantizer.tqdm = original
