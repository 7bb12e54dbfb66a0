"""A weight that the input embedding shares with the output head: held once, in panels."""

from pathlib import Path

import pytest
import torch
from mixed_batch import load_residents, mixed_rows
from tiny_models import write_random_adapter, write_tiny_model
from torch import nn

import qlora_serve.serve.engine.embedding as embedding_module
import qlora_serve.serve.engine.linear as linear_module
from qlora_serve.base.load import load_base
from qlora_serve.serve.engine.embedding import PanelEmbedding, can_look_up, held_weight
from qlora_serve.serve.engine.guide import GuideCompiler
from qlora_serve.serve.engine.kernels.native import Kernels, load_kernels
from qlora_serve.serve.engine.linear import FastLinear, PanelLinear, use_fast_linears
from qlora_serve.serve.engine.runner import Runner


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    loaded = load_kernels()
    if loaded is None:
        pytest.skip("no C++ compiler")
    return loaded


class _Scaled(nn.Embedding):
    """As Gemma's."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__(tokens, width)
        self.embed_scale = nn.Buffer(torch.tensor(width**0.5))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class _Shifted(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + 1


class _Tied(nn.Module):
    """As little of a model as `use_fast_linears` looks at."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        tokens, width = embedding.weight.shape
        self.inside, self.out = embedding, nn.Linear(width, tokens, bias=False)
        self.out.weight = embedding.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.inside


@pytest.mark.parametrize("kind", [nn.Embedding, _Scaled])
@pytest.mark.parametrize(("tokens", "width"), [(96, 64), (97, 33), (5, 16), (1030, 200)])
@torch.inference_mode()
def test_rows_out_of_panels_are_the_rows(kernels, kind, tokens, width) -> None:
    embedding = kind(tokens, width)
    model = _Tied(embedding)
    use_fast_linears(model, kernels)
    assert type(model.inside) is PanelEmbedding
    assert type(model.out) is PanelLinear
    assert model.inside.panels is model.out.panels
    for ids in (torch.randperm(tokens)[None], torch.tensor([[tokens - 1]]), torch.arange(0)[None]):
        assert torch.equal(model.inside(ids), embedding(ids))
    strided = torch.arange(6).view(3, 2)[:, :1].t() % tokens
    assert torch.equal(model.inside(strided), embedding(strided))
    assert torch.equal(model.inside.weight, embedding.weight)
    other = nn.Parameter(torch.randn(7, width))
    own = model.inside.with_weight(other)
    assert type(own) is kind
    assert torch.equal(own(torch.arange(7)), other * model.inside.embed_scale)
    for unknown in (tokens, -1):
        with pytest.raises(IndexError, match=f"1 ids are not below {tokens}"):
            model.inside(torch.tensor([[0, unknown]]))


def test_what_is_more_than_a_look_up_keeps_its_weight(kernels) -> None:
    """So does a weight that a third module shares."""
    shifted, third = _Tied(_Shifted(40, 16)), _Tied(nn.Embedding(40, 16))
    third.another = nn.Linear(16, 40, bias=False)
    third.another.weight = third.inside.weight
    clipped = _Tied(nn.Embedding(40, 16, max_norm=1.0))
    for model in (shifted, third, clipped):
        embedding = model.inside
        use_fast_linears(model, kernels)
        assert model.inside is embedding
        assert type(model.out) is FastLinear
        assert model.out.weight is embedding.weight
    assert not can_look_up(shifted.inside)
    assert can_look_up(third.inside)


def test_both_stay_where_torch_is_faster(kernels, monkeypatch) -> None:
    monkeypatch.delenv("QLORA_SERVE_NATIVE", raising=False)
    monkeypatch.setattr(linear_module, "_is_faster", lambda *_: False)
    model = _Tied(nn.Embedding(40, 16))
    use_fast_linears(model, kernels)
    assert (type(model.inside), type(model.out)) == (nn.Embedding, nn.Linear)
    assert model.out.weight is model.inside.weight


@pytest.mark.parametrize("family", ["llama", "llama-untied", "gemma3"])
@torch.inference_mode()
def test_a_served_base_looks_up_what_transformers_does(family, kernels, tmp_path) -> None:
    base = write_tiny_model(tmp_path / "base", family)
    plain = load_base(str(base), dtype="float32").model
    served = Runner(load_base(str(base), dtype="float32")).base.model
    inside, out = served.get_input_embeddings(), served.get_output_embeddings()
    ids = torch.randperm(512)[None]
    assert torch.equal(inside(ids), plain.get_input_embeddings()(ids))
    assert torch.equal(out.weight, plain.get_output_embeddings().weight)
    is_tied = family != "llama-untied"
    assert isinstance(inside, PanelEmbedding) == is_tied
    assert (held_weight(inside).data_ptr() == held_weight(out).data_ptr()) == is_tied


SETTINGS = {
    "lora": {},
    "embedding": {"target_modules": ["embed_tokens", "lm_head"]},
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]},
    "enlarged": {"vocabulary": 520, "target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("family", ["llama", "llama-untied"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@torch.inference_mode()
def test_nothing_puts_the_weight_together(family, kernels, tmp_path, monkeypatch) -> None:
    """Neither a start, nor these adapters, nor steps with them, nor a grammar."""

    def refuse(*_: object) -> None:
        raise AssertionError("a weight was put together")

    base = write_tiny_model(tmp_path / "base", family)
    paths: dict[str, Path] = {
        name: write_random_adapter(tmp_path / name, base, seed=number, **settings)
        for number, (name, settings) in enumerate(SETTINGS.items())
    }
    # PEFT writes the base's embedding beside an embedding LoRA, and that is compared with the base.
    embedding = {"embedding": paths.pop("embedding")}
    with monkeypatch.context() as patch:
        for module in (embedding_module, linear_module):
            patch.setattr(module, "from_panels", refuse)
        runner = Runner(load_base(str(base), dtype="float32"))
        residents = load_residents(runner, paths)
    residents |= load_residents(runner, embedding)
    for module in (embedding_module, linear_module):
        monkeypatch.setattr(module, "from_panels", refuse)
    mixed_rows(runner, residents, {"base": 5} | dict.fromkeys(residents, 7))
    GuideCompiler(runner.base).compile("regex", "a+")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_trained_tokens_of_tied_modules_are_held_once(kernels, tmp_path) -> None:
    base = write_tiny_model(tmp_path / "base", "llama")
    adapter = write_random_adapter(
        tmp_path / "tokens", base, target_modules=["q_proj"], trainable_token_indices=[3, 9]
    )
    runner = Runner(load_base(str(base), dtype="float32"))
    resident = load_residents(runner, {"tokens": adapter})["tokens"]
    inside, out = (resident.own[name].module for name in ("model.embed_tokens", "lm_head"))
    assert inside.weight.data_ptr() == out.weight.data_ptr()
    weight = runner.base.model.get_input_embeddings().weight
    changed = (inside.weight != weight).any(dim=1).nonzero()[:, 0].tolist()
    assert changed == [3, 9]
