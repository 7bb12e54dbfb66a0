"""The fingerprint is of the weights, not of how they lie on disk."""

import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_serve.base.identity import fingerprint, weight_files
from qlora_serve.base.source import locate_base
from qlora_serve.errors import BaseModelError
from tests.tiny_models import write_tiny_model


@pytest.fixture
def base(tmp_path):
    return write_tiny_model(tmp_path / "base", "llama-untied")


def mark(folder):
    return fingerprint(locate_base(str(folder)))


def rewrite(base, folder, change):
    shutil.copytree(base, folder)
    tensors = load_file(base / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_order_and_shards_do_not_matter(base, tmp_path):
    reversed_order = rewrite(base, tmp_path / "r", lambda t: dict(reversed(t.items())))
    sharded = tmp_path / "s"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(sharded, max_shard_size="100KB")
    assert len(weight_files(locate_base(str(sharded)))) > 1
    assert mark(base) == mark(reversed_order) == mark(sharded)


@pytest.mark.parametrize("place", [0, -1])
def test_a_changed_weight_matters(base, tmp_path, place):
    def nudge(tensors):
        name = "model.layers.1.mlp.down_proj.weight"
        changed = tensors[name].clone()
        changed.view(-1)[place] += 1e-3
        return tensors | {name: changed}

    assert mark(rewrite(base, tmp_path / "c", nudge)) != mark(base)


def test_dtype_and_names_matter(base, tmp_path):
    half = rewrite(base, tmp_path / "h", lambda t: {n: x.half() for n, x in t.items()})
    renamed = rewrite(base, tmp_path / "n", lambda t: {f"x.{n}": x for n, x in t.items()})
    assert len({mark(base), mark(half), mark(renamed)}) == 3


def test_broken_weights_are_refused(base):
    file = base / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BaseModelError, match="cut short"):
        mark(base)
    file.write_bytes(b"x")
    with pytest.raises(BaseModelError, match="not a whole safetensors file"):
        mark(base)
    file.write_bytes((10).to_bytes(8, "little") + b"[1, 2, 3] ")
    with pytest.raises(BaseModelError, match="safetensors"):
        mark(base)
    file.unlink()
    with pytest.raises(BaseModelError, match=r"no \*\.safetensors"):
        mark(base)


def test_missing_shard_is_named(base, tmp_path):
    sharded = tmp_path / "s"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(sharded, max_shard_size="100KB")
    first = min(sharded.glob("*.safetensors"))
    first.unlink()
    with pytest.raises(BaseModelError, match=f"missing, first {first.name}"):
        mark(sharded)
