"""Loading, quantizing while loading, and shapes without weights."""

import gc
from pathlib import Path

import pytest
import torch

from qlora_serve.base.load import load_base
from qlora_serve.base.prepare import prepare_base
from qlora_serve.base.skeleton import build_skeleton
from qlora_serve.base.source import locate_base
from qlora_serve.errors import BaseModelError, ConfigError
from tests.tiny_models import CONFIGS, write_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("bases") / "llama", "llama-untied")


@pytest.fixture(scope="module")
def nf4(base, tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    target = tmp_path_factory.mktemp("bases") / "nf4"
    return prepare_base(str(base), target, "nf4", lambda line: None)


@pytest.mark.parametrize("kind", CONFIGS)
def test_skeleton_has_the_shapes_and_no_memory(tmp_path, kind):
    folder = write_tiny_model(tmp_path / "base", kind)
    skeleton = build_skeleton(locate_base(str(folder)))
    real = load_base(str(folder), device="cpu").model
    shapes = {name: p.shape for name, p in skeleton.named_parameters()}
    assert shapes == {name: p.shape for name, p in real.named_parameters()}
    assert all(p.device.type == "meta" for p in skeleton.parameters())


def test_nf4_while_loading_is_near_the_base_and_not_equal(base):
    pytest.importorskip("bitsandbytes")
    tokens = torch.tensor([[1, 50, 60]])
    plain, quantized = (load_base(str(base), quantization=q, device="cpu") for q in ("none", "nf4"))
    assert (plain.quantization, quantized.quantization) == ("none", "nf4")
    assert plain.fingerprint == quantized.fingerprint
    with torch.no_grad():
        expected, got = plain.model(tokens).logits, quantized.model(tokens).logits
    correlation = torch.corrcoef(torch.stack([expected.flatten(), got.flatten()]))[0, 1]
    assert not expected.equal(got)
    assert correlation > 0.9
    assert not plain.model.training


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_base_that_is_quantized_lets_its_files_go(base, quantization):
    """One tensor that points into the mapped file would keep all of it in memory."""
    pytest.importorskip("bitsandbytes")
    plain = load_base(str(base), device="cpu")
    assert str(base) in Path("/proc/self/maps").read_text()  # which is how it would be
    del plain
    loaded = load_base(str(base), quantization=quantization, device="cpu")
    assert loaded.quantization == quantization
    gc.collect()
    assert str(base) not in Path("/proc/self/maps").read_text()


def test_nf4_copy_on_disk(base, nf4):
    source = locate_base(str(nf4))
    assert source.quantization == "nf4"
    assert source.unquantized == str(base)
    loaded = load_base(str(nf4), device="cpu")
    assert loaded.quantization == "nf4"
    assert source.unquantized_fingerprint != loaded.fingerprint
    # Its skeleton is that of the unquantized base, which adapters fit onto.
    shapes = {name: p.shape for name, p in build_skeleton(source).named_parameters()}
    plain = build_skeleton(locate_base(str(base)))
    assert shapes == {name: p.shape for name, p in plain.named_parameters()}


def test_quantized_base_is_not_quantized_again(nf4, tmp_path):
    with pytest.raises(BaseModelError, match="already quantized"):
        load_base(str(nf4), quantization="int8")
    with pytest.raises(BaseModelError, match="already quantized"):
        prepare_base(str(nf4), tmp_path / "again", "nf4", lambda line: None)
    assert not (tmp_path / "again").exists()


def test_nothing_to_prepare(base, tmp_path):
    with pytest.raises(ConfigError, match="nothing to prepare"):
        prepare_base(str(base), tmp_path / "x", "none", lambda line: None)


def test_stop_tokens_come_from_every_place(base):
    assert load_base(str(base), device="cpu").stop_token_ids == {2}


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "tpu"])
def test_unknown_device_is_one_line(base, device):
    with pytest.raises(BaseModelError, match="--device"):
        load_base(str(base), device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu(base):
    with pytest.raises(BaseModelError, match="no GPU"):
        load_base(str(base), device="cuda")


def test_architecture_that_transformers_does_not_know(base, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(BaseModelError, match="nonesuch"):
        build_skeleton(locate_base(str(tmp_path)))
