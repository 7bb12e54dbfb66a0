"""Tokens that a base has never learnt."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_serve.base.source import locate_base
from qlora_serve.base.untrained import (
    read_vocabulary_weights,
    template_tokens,
    untrained_rows,
    untrained_template_tokens,
    vocabulary_weights,
)
from tests.tiny_models import tiny_tokenizer, write_tiny_model

WIDTH, USED, PADDED = 64, 512, 544


def _trained() -> torch.Tensor:
    """Rows of different lengths around a common mean, as training leaves them."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(PADDED, WIDTH, generator=generator) + 0.3
    return rows * (0.6 + 0.8 * torch.rand(PADDED, 1, generator=generator))


def _empty(rows: torch.Tensor, token: int) -> None:
    rows[token] = 0


def _short(rows: torch.Tensor, token: int) -> None:
    rows[token] *= 0.05


def _twins(rows: torch.Tensor, token: int) -> None:
    for other in (token, 400, 401):
        rows[other] = rows[300] * (1 + 1e-4 * (other % 7))


def _like_padding(rows: torch.Tensor, token: int) -> None:
    first = torch.nn.functional.normalize(torch.randn(PADDED - USED, WIDTH), dim=1)
    rows[USED:] = first * 14.0
    rows[token] = first.mean(dim=0) / first.mean(dim=0).norm() * rows[USED].norm()


@pytest.mark.parametrize("damage", [_empty, _short, _twins, _like_padding])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_training_never_reached_is_found(
    damage: Callable[[torch.Tensor, int], None], dtype: torch.dtype
) -> None:
    rows = _trained()
    assert untrained_rows(rows.to(dtype), range(USED), USED) == []
    damage(rows, 1)
    assert untrained_rows(rows.to(dtype), [0, 1, 2], USED) == [1]


def test_two_equal_rows_are_chance_and_a_fine_tuned_one_is_trained() -> None:
    rows = _trained()
    rows[1] = rows[300]
    assert untrained_rows(rows, [1], USED) == []
    rows[400:410] = rows[1]
    assert untrained_rows(rows, [1], USED) == [1]
    rows[1] += 0.1 * torch.randn(WIDTH)
    assert untrained_rows(rows, [1], USED) == []


def test_tokens_outside_the_vocabulary_are_left_out() -> None:
    assert untrained_rows(_trained(), [PADDED, -1], USED) == []


@pytest.mark.parametrize("kind", ["llama", "llama-untied"])
def test_the_templates_tokens_of_a_model(kind: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / kind, kind)
    tokenizer = tiny_tokenizer()
    assert tokenizer.convert_ids_to_tokens(template_tokens(tokenizer)) == [
        "<|im_start|>",
        "<|im_end|>",
    ]
    source = locate_base(str(folder))
    # transformers starts the row of the padding token, here also the end token, at zero.
    weights = read_vocabulary_weights(source)
    assert untrained_template_tokens(tokenizer, weights) == ["<|im_end|>"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[2] = torch.randn(64) * 0.1
        model.get_output_embeddings().weight[1] = 0
    model.save_pretrained(folder)
    weights = vocabulary_weights(model)
    assert len(weights) == (1 if kind == "llama" else 2)
    from_files = read_vocabulary_weights(source)
    assert len(from_files) == len(weights)
    for found in (weights, from_files):
        assert untrained_template_tokens(tokenizer, found) == ["<|im_start|>"]
