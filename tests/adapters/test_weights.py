"""What each kind of adapter becomes, and what is refused by name."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import write_random_adapter, write_tiny_model

from qlora_serve.adapters.files import read_adapter
from qlora_serve.adapters.fit import FitChecker
from qlora_serve.adapters.weights import load_weights
from qlora_serve.base.source import locate_base
from qlora_serve.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
FEW = {"target_modules": ["q_proj"]}


@pytest.fixture(scope="module")
def phi(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("bases") / "phi", "phi")


def load(base, folder):
    return load_weights(read_adapter(folder), FitChecker(locate_base(str(base))))


def test_every_tensor_finds_its_place(phi, tmp_path):
    settings = FEW | {"bias": "all", "use_dora": True, "modules_to_save": ["lm_head"]}
    folder = write_random_adapter(tmp_path / "a", phi, **settings)
    weights = load(phi, folder)
    stored = load_file(folder / "adapter_model.safetensors")
    stem = "base_model.model."
    layer = "model.layers.1.self_attn.q_proj"
    assert weights.modules[layer].magnitude.equal(stored[f"{stem}{layer}.lora_magnitude_vector"])
    assert weights.biases[layer].equal(stored[f"{stem}{layer}.base_layer.bias"])
    other = "model.layers.2.mlp.fc1"
    assert weights.biases[other].equal(stored[f"{stem}{other}.bias"])
    assert weights.replaced.keys() == {"lm_head"}
    assert weights.replaced["lm_head"].keys() == {"weight", "bias"}
    assert "lm_head" not in weights.biases
    assert not weights.is_dead


def test_trained_tokens_of_tied_weights_share_their_rows(base, tmp_path):
    folder = write_random_adapter(tmp_path / "a", base, trainable_token_indices=[9, 4], **FEW)
    rows = load(base, folder).token_rows
    assert rows.keys() == {"model.embed_tokens", "lm_head"}
    assert rows["lm_head"].indices == (9, 4)
    assert rows["lm_head"].rows is rows["model.embed_tokens"].rows


def test_missing_bias_is_missing(phi, tmp_path, edit_tensors):
    folder = write_random_adapter(tmp_path / "a", phi, bias="lora_only", **FEW)
    edit_tensors(folder, lambda t: {n: x for n, x in t.items() if "layers.1" not in n or "A" in n})
    with pytest.raises(AdapterError, match=r"2 tensors are missing .*layers.1.*base_layer.bias"):
        load(phi, folder)
    edit_tensors(folder, lambda t: t | {"base_model.model.x": torch.zeros(1)})
    with pytest.raises(AdapterError, match=r"1 tensor matches nothing in this base \("):
        load(phi, folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (FEW | {"modules_to_save": ["mlp"]}, r"mlp whole \(modules_to_save\)"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "olora"}, "changes the base"),
    ],
)
def test_what_is_refused_by_name(base, tmp_path, settings, words):
    folder = write_random_adapter(tmp_path / "a", base, **settings)
    with pytest.raises(AdapterError, match=words) as caught:
        load(base, folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alora_invocation_tokens", [1, 2]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("use_qalora", True),
        ("target_parameters", ["mlp.weight"]),
        ("kasa_config", {"beta": 1.0}),
        ("monteclora_config", {"num_samples": 2}),
        ("arrow_config", {"top_k": 2}),
        ("use_bdlora", {"nblocks": 2}),
    ],
)
def test_settings_that_are_refused(adapter, base, edit_config, name, value):
    edit_config(adapter, **{name: value})
    with pytest.raises(AdapterError, match=f"{name}|PEFT refuses") as caught:
        load(base, adapter)
    assert "\n" not in str(caught.value)


def test_smaller_vocabulary_is_refused_in_words(adapter, base, edit_tensors):
    name = "base_model.model.model.embed_tokens.weight"
    edit_tensors(adapter, lambda t: t | {name: torch.zeros(500, 64)})
    with pytest.raises(AdapterError, match="its vocabulary has 500 tokens"):
        load(base, adapter)
