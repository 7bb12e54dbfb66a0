"""Our loss against transformers' own."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qlora_serve.base.tokenizer import stop_token_ids
from qlora_serve.train import loss as loss_module
from qlora_serve.train.batches import LengthGroupedSampler, pad_rows
from qlora_serve.train.dataset import IGNORED, RowDataset
from qlora_serve.train.layout import Layout
from qlora_serve.train.loss import summed_cross_entropy, trained_positions_loss
from qlora_serve.train.masks import TokenizedRow, tokenize_row
from tests.tiny_models import CHATML, write_random_adapter, write_tiny_model
from tests.train.chats import SOME_CHATS, tokenizer_with


def _rows(count: int) -> list[TokenizedRow]:
    tokenizer = tokenizer_with(CHATML)
    stops = stop_token_ids(tokenizer)
    return [tokenize_row(tokenizer, chat, 512, stops) for chat in SOME_CHATS[:count]]


def _peft_model(folder: Path, kind: str) -> Any:
    base = write_tiny_model(folder / "base", kind)
    adapter = write_random_adapter(folder / "adapter", base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter, is_trainable=True).train()


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "phi"])
def test_loss_and_gradients_equal_transformers_own(tmp_path: Path, kind: str) -> None:
    # gemma2 soft-caps its logits; phi's output head has a bias.
    model = _peft_model(tmp_path, kind)
    dataset = RowDataset(_rows(6))
    micro_batches = [pad_rows([dataset[i] for i in part]) for part in ((0, 4, 3), (1, 2), (5,))]
    tokens = sum(int((batch["labels"] != IGNORED).sum()) for batch in micro_batches)

    theirs = 0.0
    for batch in micro_batches:
        loss = model(**batch, num_items_in_batch=tokens).loss
        loss.backward()
        theirs += float(loss.detach())
    expected = _gradients(model)

    layout = Layout(model, packing=False)
    ours = 0.0
    for batch in micro_batches:
        loss = layout.loss(model, batch) / tokens
        loss.backward()
        ours += float(loss.detach())

    assert math.isclose(ours, theirs, rel_tol=1e-6)
    found = _gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


def test_only_counted_positions_reach_the_output_head(tmp_path: Path) -> None:
    model = _peft_model(tmp_path, "llama")
    batch = pad_rows([RowDataset(_rows(2))[i] for i in range(2)])
    labels = batch.pop("labels")
    head = model.get_base_model().get_output_embeddings()
    seen = []
    head.register_forward_hook(lambda _, __, output: seen.append(output.shape))
    trained_positions_loss(model, head, batch, labels)
    assert seen == [(1, int((labels != IGNORED).sum()), 512)]
    model(**batch)
    assert seen[1][:2] == batch["input_ids"].shape


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 33, requires_grad=True)
    targets = torch.randint(33, (50,))
    whole = summed_cross_entropy(logits, targets)
    (expected,) = torch.autograd.grad(whole, logits)
    monkeypatch.setattr(loss_module, "_CHUNK_ROWS", 16)
    parts = summed_cross_entropy(logits, targets)
    (found,) = torch.autograd.grad(parts, logits)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(found, expected)


def test_padding_is_told_by_its_place() -> None:
    # The padding token of the tiny models is their end token, 2.
    rows = [
        TokenizedRow([7, 8, 2, 9, 2], [False, True, True, False, True]),
        TokenizedRow([5, 2], [False, True]),
    ]
    batch = pad_rows([RowDataset(rows)[i] for i in range(2)])
    assert batch["labels"].tolist() == [[-100, 8, 2, -100, 2], [-100, 2, -100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch["input_ids"][0].tolist() == [7, 8, 2, 9, 2]


@pytest.mark.parametrize("count", [1, 7, 8, 300])
def test_order_holds_every_row_once_in_batches_of_like_length(count: int) -> None:
    lengths = [(i * 37) % 101 + 1 for i in range(count)]
    sampler = LengthGroupedSampler(lengths, micro_batch=4, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(count))
    assert first == list(sampler)
    sampler.set_epoch(1)
    assert sorted(sampler) == list(range(count))

    def padding(order: list[int]) -> int:
        parts = [[lengths[i] for i in order[s : s + 4]] for s in range(0, count, 4)]
        return sum(max(part) * len(part) - sum(part) for part in parts)

    if count == 300:
        assert list(sampler) != first
        assert padding(first) < padding(list(range(count))) / 4
