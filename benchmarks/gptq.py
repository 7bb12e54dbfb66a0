"""What 4 bits cost a small model: GPTQ beside rounding to nearest, and the float32 model itself.

    python benchmarks/gptq.py                     SmolLM2, groups of 128, symmetric
    python benchmarks/gptq.py --base B --group-size 32

Perplexity on held-out chats of the example data and on prose, none of which calibrates, and the
mean Kullback-Leibler divergence of the prose's next tokens from the float32 model's.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from qlora_serve.base.load import load_base
from qlora_serve.base.prepare import prepare_base
from qlora_serve.base.quantize_gptq import GptqSettings
from qlora_serve.base.tokenizer import encode_text, render_chat

_ROOT = Path(__file__).parents[1]
_CHATS = ("examples/data/tickets.heldout.jsonl", "examples/data/tagging.heldout.jsonl")
_CHATS_EACH = 8
_PROSE = ("docs/architecture.md", "docs/train.md", "LICENSE")
_PROSE_TOKENS = 512


def main() -> None:
    """Quantizes, measures, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--group-size", type=int, default=128)
    flags = parser.parse_args()
    base = load_base(flags.base, dtype="float32")
    chats, prose = _chats(base.tokenizer), _prose(base.tokenizer)
    expected = [_log_probs(base.model, row) for row in prose]
    print(f"| weights | {len(chats)} chats | {len(prose)} pieces of prose | KL |")
    print("|---|---|---|---|")
    _print("float32", base.model, chats, prose, expected)
    _round(base.model, flags.group_size)
    _print("rounded to nearest", base.model, chats, prose, expected)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "gptq"
        settings = GptqSettings(group_size=flags.group_size)
        prepare_base(flags.base, copy, "gptq", lambda line: None, settings)
        quantized = load_base(str(copy), dtype="float32")
        _print("GPTQ", quantized.model, chats, prose, expected)


def _chats(tokenizer: Any) -> list[list[int]]:
    lines = [
        line for name in _CHATS for line in (_ROOT / name).read_text().splitlines()[:_CHATS_EACH]
    ]
    return [
        encode_text(tokenizer, render_chat(tokenizer, json.loads(x)["messages"])) for x in lines
    ]


def _prose(tokenizer: Any) -> list[list[int]]:
    texts = [(_ROOT / name).read_text() for name in _PROSE]
    return [encode_text(tokenizer, text)[:_PROSE_TOKENS] for text in texts]


@torch.inference_mode()
def _log_probs(model: Any, row: list[int]) -> Any:
    return model(torch.tensor([row])).logits[0].log_softmax(-1)  # [tokens, vocabulary]


def _perplexity(model: Any, rows: list[list[int]]) -> float:
    total, tokens = 0.0, 0
    for row in rows:
        found = _log_probs(model, row)[:-1].gather(1, torch.tensor(row[1:])[:, None])
        total, tokens = total - float(found.sum()), tokens + len(row) - 1
    return math.exp(total / tokens)


def _print(name: str, model: Any, chats: Any, prose: Any, expected: list[Any]) -> None:
    divergences = [
        (log_p.exp() * (log_p - _log_probs(model, row))).sum(-1)
        for log_p, row in zip(expected, prose, strict=True)
    ]
    divergence = float(torch.cat(divergences).mean())
    figures = f"{_perplexity(model, chats):.1f} | {_perplexity(model, prose):.1f}"
    print(f"| {name} | {figures} | {divergence:.3f} |", flush=True)


@torch.no_grad()
def _round(model: Any, group_size: int) -> None:
    """Rounds as GPTQ's symmetric format stores: 16 codes around zero, a scale for each group."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings():
            for group in layer.weight.split(group_size, dim=1):
                scale = group.abs().amax(1, keepdim=True) * 2 / 15
                group.copy_((group / scale).round().clamp(-8, 7) * scale)


if __name__ == "__main__":
    main()
