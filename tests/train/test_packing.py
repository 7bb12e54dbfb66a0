"""Batches without padding: the same loss and gradients as each row alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM, MambaConfig

from qlora_serve.base.tokenizer import stop_token_ids
from qlora_serve.errors import ConfigError
from qlora_serve.train import layout as layout_module
from qlora_serve.train.batches import flat_rows, pack, packed_lines, pad_rows
from qlora_serve.train.dataset import IGNORED, PackedDataset, RowDataset
from qlora_serve.train.fast_lora import fast_lora
from qlora_serve.train.layout import Layout, even_pieces
from qlora_serve.train.loss import HeadForm, find_head_form
from qlora_serve.train.masks import TokenizedRow, tokenize_row
from qlora_serve.train.row_attention import row_spans
from tests.tiny_models import CHATML, write_random_adapter, write_tiny_model
from tests.train.chats import SOME_CHATS, tokenizer_with

KINDS = ["llama", "qwen3", "mistral", "gemma2", "phi", "phi3"]


def _rows(count: int) -> list[TokenizedRow]:
    tokenizer = tokenizer_with(CHATML)
    stops = stop_token_ids(tokenizer)
    return [tokenize_row(tokenizer, chat, 512, stops) for chat in SOME_CHATS[:count]]


def _peft_model(folder: Path, kind: str, **settings: Any) -> Any:
    base = write_tiny_model(folder / "base", kind)
    adapter = write_random_adapter(folder / "adapter", base, **settings)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter, is_trainable=True).train()


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _rows_alone(model: Any, rows: list[TokenizedRow]) -> tuple[float, dict[str, torch.Tensor]]:
    """transformers' own loss and gradients, a row at a time and without any mask."""
    dataset = RowDataset(rows)
    items = [dataset[i] for i in range(len(rows))]
    tokens = sum(label != IGNORED for item in items for label in item["labels"])
    total = 0.0
    for item in items:
        batch = {name: torch.tensor([values]) for name, values in item.items()}
        loss = model(**batch, num_items_in_batch=tokens).loss
        loss.backward()
        total += float(loss.detach())
    return total, _gradients(model)


def _step(layout: Layout, model: Any, batch: dict[str, torch.Tensor]) -> float:
    """What the trainer does with a micro-batch."""
    tokens = int((batch["labels"] != IGNORED).sum())
    total = 0.0
    for piece in layout.pieces(batch):
        with layout.over(piece):
            loss = layout.loss(model, piece) / tokens
            loss.backward()
        total += float(loss.detach())
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["flat", "pieces", "lean", "packed", "fast"])
def test_a_packed_step_equals_the_rows_alone(
    tmp_path: Path, kind: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows of 40 to 60 tokens: mistral and gemma2 see 24 of them at a time.
    model = _peft_model(tmp_path, kind)
    rows = _rows(7)
    expected_loss, expected = _rows_alone(model, rows)

    dataset = PackedDataset(rows, pack([len(row.input_ids) for row in rows], 128))
    assert len(dataset) < len(rows)
    if form == "packed":  # as where this attention is not the model's
        monkeypatch.setattr(layout_module.Layout, "_try_rows", lambda *_: False)
    layout = Layout(model, packing=True, lean=form == "lean")
    assert layout.kind == ("packed" if form == "packed" else "flat")
    if form == "pieces":
        monkeypatch.setattr(layout_module, "_PIECE_TOKENS", 100)
    batch = layout.collate([dataset[i] for i in range(len(dataset))])
    assert len(layout.pieces(batch)) == {"pieces": 4, "lean": 2}.get(form, 1)
    if form == "fast":
        with fast_lora(model) as replaced:
            assert replaced == sum("lora_A" in name for name in expected)
            loss = _step(layout, model, batch)
    else:
        loss = _step(layout, model, batch)

    assert loss == pytest.approx(expected_loss, rel=1e-5)
    found = _gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=2e-6)
    # Attention is the model's own again.
    assert model.get_base_model().config._attn_implementation in ("sdpa", "eager")


def test_rows_that_would_see_each_other_are_not_packed() -> None:
    # A recurrent state goes on from row to row, whatever the positions say.
    config = MambaConfig(
        vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.5
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    assert Layout(model, packing=False).kind == "padded"
    with pytest.raises(ConfigError, match=r"see each other in this model .mamba.*without packing"):
        Layout(model, packing=True)


@pytest.mark.parametrize(
    ("kind", "expected"), [("llama", HeadForm()), ("gemma2", HeadForm(cap=30.0))]
)
def test_what_a_model_does_to_its_logits_is_found_out(
    tmp_path: Path, kind: str, expected: HeadForm
) -> None:
    model = _peft_model(tmp_path, kind).get_base_model()
    head = model.get_output_embeddings()
    assert find_head_form(model, head) == expected
    # Something that no form describes.
    handle = head.register_forward_hook(lambda _, __, output: output)
    forward = model.forward

    def odd(*arguments: Any, **options: Any) -> Any:
        output = forward(*arguments, **options)
        output.logits = output.logits**3
        return output

    model.forward = odd
    assert find_head_form(model, head) is None
    handle.remove()


@pytest.mark.parametrize("parts", [{}, {"cap": 5.0}, {"scale": 0.25}])
@pytest.mark.parametrize("chunk", [4 * 33 * 7, 1 << 30])
def test_the_chunked_head_equals_autograd(
    parts: dict[str, float], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_serve.train import loss as module

    torch.manual_seed(0)
    monkeypatch.setattr(module, "_CHUNK_BYTES", chunk)
    hidden = torch.randn(20, 16, requires_grad=True)
    weight = torch.randn(33, 16, requires_grad=True)
    bias = torch.randn(33, requires_grad=True)
    targets = torch.randint(33, (20,))
    logits = (hidden @ weight.T + bias) * parts.get("scale", 1.0)
    if "cap" in parts:
        logits = torch.tanh(logits / parts["cap"]) * parts["cap"]
    wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    expected = torch.autograd.grad(3 * wanted, (hidden, weight, bias))
    loss: Any = module._HeadLoss.apply(hidden, weight, bias, targets, HeadForm(**parts))
    found = torch.autograd.grad(3 * loss, (hidden, weight, bias))
    torch.testing.assert_close(loss, wanted)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_dropout": 0.5}])
def test_only_plain_layers_are_made_fast(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = _peft_model(tmp_path, "llama", **settings)
    with fast_lora(model) as replaced:
        assert replaced == 0


def test_fast_layers_step_aside(tmp_path: Path) -> None:
    model = _peft_model(tmp_path, "llama")
    ids = torch.arange(6)[None]
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        with model.disable_adapter():
            plain = model(input_ids=ids).logits
    with fast_lora(model):
        found = model(input_ids=ids).logits
        with model.disable_adapter():
            disabled = model(input_ids=ids).logits
    torch.testing.assert_close(found, adapted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(disabled, plain)
    assert not any("forward" in vars(module) for module in model.modules())


def test_nf4_layers_are_made_fast(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from qlora_serve.base.load import load_base

    base = load_base(str(write_tiny_model(tmp_path / "base")), "nf4", device="cpu")
    model = get_peft_model(base.model, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = {"input_ids": torch.arange(9)[None], "labels": torch.arange(9)[None]}
    model(**batch).loss.backward()
    expected = _gradients(model)
    with fast_lora(model) as replaced:
        assert replaced == 3 * 7
        model(**batch).loss.backward()
    found = _gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=80))
def test_lines_hold_every_row_once(lengths: list[int]) -> None:
    lines = pack(lengths, 64)
    assert sorted(row for line in lines for row in line) == list(range(len(lengths)))
    sizes = [sum(lengths[row] for row in line) for line in lines]
    assert max(sizes) <= 64
    # Best fit leaves no two lines that would fit into one.
    if len(sizes) > 1:
        smallest, second = sorted(sizes)[:2]
        assert smallest + second > 64


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=40), st.integers(1, 200))
def test_pieces_lie_between_rows(lengths: list[int], limit: int) -> None:
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    pieces = even_pieces(spans, limit)
    assert [first for first, _ in pieces] == [0, *(last for _, last in pieces[:-1])]
    assert pieces[-1][1] == ends[-1]
    assert all(last in ends for _, last in pieces)
    assert len(pieces) <= -(-ends[-1] // limit)
    assert all(last - first <= limit + max(lengths) for first, last in pieces)


def test_layouts_of_two_items() -> None:
    items: list[Any] = [
        [{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7], "labels": [-100]}],
        {"input_ids": [8, 9], "labels": [-100, 9]},
    ]
    flat = {name: tensor.tolist() for name, tensor in flat_rows(items).items()}
    assert flat == {
        "input_ids": [[5, 6, 7, 8, 9]],
        "position_ids": [[0, 1, 0, 0, 1]],
        "labels": [[-100, 6, -100, -100, 9]],
    }
    assert row_spans(torch.tensor(flat["position_ids"])) == [(0, 2), (2, 3), (3, 5)]
    packed = {name: tensor.tolist() for name, tensor in packed_lines(items).items()}
    assert packed == {
        "input_ids": [[5, 6, 7], [8, 9, 0]],
        "position_ids": [[0, 1, 0], [0, 1, 0]],
        "labels": [[-100, 6, -100], [-100, 9, -100]],
    }
    assert pad_rows(items)["input_ids"].tolist() == [[5, 6], [7, 0], [8, 9]]


def test_what_follows_the_last_counted_token_is_left_out() -> None:
    row = TokenizedRow([7, 8, 2, 9, 3], [False, True, True, False, False])
    assert RowDataset([row])[0] == {"input_ids": [7, 8, 2], "labels": [-100, 8, 2]}
    nothing = TokenizedRow([7, 8], [False, False])
    assert RowDataset([nothing])[0] == {"input_ids": [7], "labels": [-100]}
