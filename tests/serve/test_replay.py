"""Replayed layers give the same bits as the model's own forward, or are left alone."""

import shutil

import pytest
import torch
from mixed_batch import give_blocks, load_residents, mixed_rows, new_sequence
from tiny_models import CONFIGS, write_random_adapter, write_tiny_model
from torch import nn
from transformers import LlamaConfig, Qwen2Config

from qlora_serve.base.load import load_base
from qlora_serve.serve.engine.recording import NotRecordableError
from qlora_serve.serve.engine.replay import LayerReplay
from qlora_serve.serve.engine.runner import Runner
from qlora_serve.serve.engine.scheduler import Chunk

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="there is no C++ compiler here, so there are no kernels"
)

# The rotation's kernel wants heads of 32 dimensions; those of most tiny models are narrower.
_SETTINGS = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1,
    "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_WIDE = {
    "llama": lambda: LlamaConfig(**_SETTINGS, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**_SETTINGS),
    "qwen3": CONFIGS["qwen3"],
}


@pytest.fixture(autouse=True)
def _kernels_everywhere(monkeypatch) -> None:
    monkeypatch.setenv("QLORA_SERVE_NATIVE", "always")


@pytest.fixture(params=sorted(_WIDE))
def runner_and_residents(request, tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGS, request.param, _WIDE[request.param])
    base = write_tiny_model(tmp_path / "base", request.param)
    paths = {
        "plain": write_random_adapter(tmp_path / "plain", base, seed=1),
        "few": write_random_adapter(tmp_path / "few", base, 2, target_modules=["v_proj"], r=3),
        "dora": write_random_adapter(tmp_path / "dora", base, 3, use_dora=True),
    }
    runner = Runner(load_base(str(base), dtype="float32"))
    return runner, load_residents(runner, paths)


@torch.inference_mode()
@pytest.mark.parametrize("names", [("base",), ("base", "plain", "few", "other")])
def test_replayed_steps_give_the_same_bits(runner_and_residents, names, monkeypatch) -> None:
    """Prompts in chunks and decoding, of the base and of adapters side by side."""
    runner, residents = runner_and_residents
    lengths = dict(zip(names, (33, 5, 41, 12), strict=False))
    replayed = mixed_rows(runner, residents, lengths)
    assert runner.replay is not None
    assert runner.replay.steps == 6  # two of prompts, four of decoding
    runner.replay.remove()
    monkeypatch.setattr(Runner, "_record", lambda self, rows: None)
    alone = mixed_rows(runner, residents, lengths)
    assert runner.replay is None
    for name in names:
        assert torch.equal(replayed[name].logits, alone[name].logits)
        assert replayed[name].tokens == alone[name].tokens


@torch.inference_mode()
def test_steps_with_other_adapters_are_computed_by_the_model(runner_and_residents) -> None:
    runner, residents = runner_and_residents
    mixed_rows(runner, residents, {"base": 9, "dora": 11})
    assert runner.replay is not None
    assert runner.replay.steps == 0


@torch.inference_mode()
def test_only_the_first_layer_is_asked_and_the_list_is_put_back(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(CONFIGS, "llama", _WIDE["llama"])
    runner = Runner(load_base(str(write_tiny_model(tmp_path / "base")), dtype="float32"))
    decoder = runner.base.model.model
    layers = decoder.layers
    sequence = new_sequence([5, 6, 7], None)
    give_blocks(runner, [sequence], 1)
    replay = runner.replay
    assert replay is not None
    assert [*decoder.layers] == [*decoder.layers[:3]] == [*layers]
    assert [*decoder.layers[1:]] == [*layers][1:]
    assert decoder.layers[-1] is layers[-1]
    asked: list[int] = []
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, number=number: asked.append(number))
    replayed = runner.forward([Chunk(sequence, 0, 3)])
    assert asked == [0]
    replay.remove()
    assert decoder.layers is layers
    runner.replay = None
    assert torch.equal(runner.forward([Chunk(sequence, 0, 3)]), replayed)
    assert asked == [0, 0, 1, 2]


@torch.inference_mode()
def test_a_step_knows_nothing_of_the_one_before(runner_and_residents) -> None:
    """As many rows, but of other adapters, or of none."""
    runner, residents = runner_and_residents
    whose = (residents["plain"], None, residents["few"], None)
    sequences = [new_sequence([5, 6, 7], adapter) for adapter in whose]
    give_blocks(runner, sequences, 1)
    assert runner.replay is not None
    plain, base, few, again = (runner.forward([Chunk(one, 0, 3)]) for one in sequences)
    assert runner.replay.steps == 4
    runner.replay.remove()
    runner.replay = None
    for one, found in zip(sequences, (plain, base, few, again), strict=True):
        assert torch.equal(runner.forward([Chunk(one, 0, 3)]), found)
    assert not torch.equal(plain, base)
    assert torch.equal(base, again)


@torch.inference_mode()
def test_layers_that_do_anything_else_are_left_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(CONFIGS, "llama", _WIDE["llama"])
    base = write_tiny_model(tmp_path / "base")
    runner = Runner(load_base(str(base), dtype="float32"))
    expected = mixed_rows(runner, {}, {"base": 20})["base"]
    replay = runner.replay
    assert replay is not None
    replay.remove()

    class Doubled(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.inside(hidden) * 2

    layer = runner.base.model.model.layers[1]
    layer.mlp = Doubled(layer.mlp)
    with pytest.raises(NotRecordableError, match="mul"):
        LayerReplay(runner.base.model, runner._context, 64)
    assert "forward" not in vars(layer), "the model is as it was"
    found = mixed_rows(runner, {}, {"base": 20})["base"]
    assert runner.replay is None
    assert not torch.equal(found.logits, expected.logits)


@torch.inference_mode()
def test_what_happens_between_layers_is_noticed(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(CONFIGS, "llama", _WIDE["llama"])
    runner = Runner(load_base(str(write_tiny_model(tmp_path / "base")), dtype="float32"))
    layer = runner.base.model.model.layers[1]
    layer.register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
    mixed_rows(runner, {}, {"base": 5})
    assert runner.replay is None
