"""Memory that is ready before a base's weights are."""

import json
import subprocess
import sys

import pytest
import torch
from tiny_models import write_tiny_model

from qlora_serve.base.load import load_base
from qlora_serve.serve.ahead import pages_ahead
from qlora_serve.serve.config import ServeSettings
from qlora_serve.serve.engine.host_memory import Arena
from qlora_serve.serve.engine.large_pages import PagesAhead
from qlora_serve.serve.engine.linear import PanelLinear
from qlora_serve.serve.engine.runner import Runner


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("base") / "tiny"))


def test_it_is_zero_and_can_be_written(base) -> None:
    ahead = PagesAhead(40_000_001)
    memory = ahead.take()
    assert len(memory) >= 40_000_001
    assert memory[:1] == memory[40_000_000:40_000_001] == b"\0"
    memory[40_000_000:40_000_001] = b"x"
    assert memory[39_999_999:40_000_001] == b"\0x"


def test_the_weights_of_a_base_lie_in_it_and_are_the_same(base) -> None:
    ahead = pages_ahead(ServeSettings(base=base))
    assert ahead is not None
    arena = Arena(first=ahead.take())
    begin = arena.empty(1).data_ptr()
    served = Runner(load_base(base, dtype="float32"), arena=arena).base.model
    plain = load_base(base, dtype="float32").model
    weights = {name: module.weight for name, module in plain.named_modules()
               if isinstance(module, torch.nn.Linear)}  # fmt: skip
    for name, module in served.named_modules():
        layer = getattr(module, "base", module)
        plain_name = name.removesuffix(".base")
        if plain_name in weights:
            assert torch.equal(layer.weight, weights[plain_name])
        if isinstance(layer, PanelLinear):
            assert 0 < layer.panels.data_ptr() - begin < ahead.size
    embedding = served.get_input_embeddings().panels
    assert 0 < embedding.data_ptr() - begin < ahead.size


@pytest.mark.parametrize(
    "changed",
    [{"quantization": "nf4"}, {"dtype": "bfloat16"}, {"base": "nowhere"}, {"base": "org/model"}],
)
def test_it_is_left_alone_where_it_is_not_known_to_be_wanted(base, changed) -> None:
    assert pages_ahead(ServeSettings(**{"base": base} | changed)) is None


def test_it_is_left_alone_for_a_quantized_or_broken_checkpoint(base, tmp_path) -> None:
    write_tiny_model(tmp_path / "gptq")
    config = tmp_path / "gptq" / "config.json"
    quantized = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    config.write_text(json.dumps(json.loads(config.read_text()) | quantized))
    assert pages_ahead(ServeSettings(base=str(tmp_path / "gptq"))) is None
    broken = write_tiny_model(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    assert pages_ahead(ServeSettings(base=str(broken))) is None


def test_it_begins_before_torch_is_there() -> None:
    code = "import qlora_serve.serve.ahead, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
