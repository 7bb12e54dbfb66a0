"""Identity ignores the layout of files: order, shards, alignment; and nothing else."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from qlora_serve.adapters.files import read_adapter
from qlora_serve.adapters.identity import content_identity
from qlora_serve.adapters.sources import find_source
from qlora_serve.adapters.store import AdapterStore
from qlora_serve.errors import AdapterError
from tests.bare_adapters import bare_tensors, write_bare_adapter

FILE = "adapter_model.safetensors"


def identity(folder):
    return content_identity(read_adapter(folder))


def write_shards(folder, parts, index=None):
    """Writes each part as a shard, and an index of that name when there is to be one."""
    (folder / FILE).unlink(missing_ok=True)
    names = [
        f"adapter_model-{n:05}-of-{len(parts):05}.safetensors" for n in range(1, len(parts) + 1)
    ]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name, {"format": "pt"})
    if index is not None:
        where = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def write_in_order(file, tensors, padding=0):
    """A safetensors file with its data in just this order, which the library would sort."""
    header, data = {"__metadata__": {"x": "y" * padding}}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype]
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


TENSORS = st.dictionaries(
    st.text("abcdefgh._", min_size=1, max_size=6),
    st.tuples(
        st.integers(0, 3), st.integers(1, 3), st.sampled_from([torch.float32, torch.bfloat16])
    ),
    min_size=1,
    max_size=6,
)


def build(shapes):
    return {
        name: torch.arange(rows * columns).view(rows, columns).to(dtype) + number
        for number, (name, (rows, columns, dtype)) in enumerate(shapes.items())
    }


@settings(max_examples=40, deadline=None)
@given(TENSORS, st.randoms(use_true_random=False), st.integers(1, 4), st.integers(0, 20))
def test_order_and_shards_leave_it(shapes, choose, count, padding):
    tensors = build(shapes)
    with tempfile.TemporaryDirectory() as made:
        folder = write_bare_adapter(Path(made))
        save_file(tensors, folder / FILE)
        before = identity(folder)
        shuffled = dict(choose.sample(list(tensors.items()), len(tensors)))
        write_in_order(folder / FILE, shuffled, padding)
        assert identity(folder) == before
        parts = [{} for _ in range(count)]
        for name, tensor in shuffled.items():
            choose.choice(parts)[name] = tensor
        write_shards(folder, parts)
        assert identity(folder) == before


@settings(max_examples=40, deadline=None)
@given(TENSORS, st.data())
def test_any_change_of_a_tensor_changes_it(shapes, data):
    tensors = build(shapes)
    name = data.draw(st.sampled_from(sorted(tensors)))
    changed = dict(tensors)
    other_type = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}
    tensor = tensors[name]
    change = data.draw(st.sampled_from(["value", "dtype", "shape", "name", "gone", "swapped"]))
    if change == "value" and tensor.numel():
        place = data.draw(st.integers(0, tensor.numel() - 1))
        changed[name] = tensor.clone()
        changed[name].view(-1)[place] += 1
    elif change == "dtype":
        changed[name] = tensor.to(other_type[tensor.dtype])
    elif change == "shape":
        changed[name] = tensor.reshape(*tensor.shape, 1)
    elif change == "name":
        changed[name + "x"] = changed.pop(name)
    elif change == "gone":
        del changed[name]
    else:
        other = data.draw(st.sampled_from(sorted(tensors)))
        changed[name], changed[other] = changed[other], changed[name]
    same = changed.keys() == tensors.keys() and all(
        t.dtype == changed[n].dtype and t.shape == changed[n].shape and t.equal(changed[n])
        for n, t in tensors.items()
    )
    with tempfile.TemporaryDirectory() as made:
        folder = write_bare_adapter(Path(made))
        save_file(tensors, folder / FILE)
        before = identity(folder)
        save_file(changed, folder / FILE)
        assert (identity(folder) == before) is same


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["r", "lora_alpha", "target_modules", "base_model_name_or_path"]),
        st.integers(1, 3),
        min_size=1,
    )
)
def test_scale_target_and_base_change_it(changes):
    values = {"r": [2, 4], "lora_alpha": [4, 8], "target_modules": [["q_proj"], ["k_proj"]]}
    values["base_model_name_or_path"] = ["some-base", "another"]
    config = {name: values[name][number % 2] for name, number in changes.items()}
    with tempfile.TemporaryDirectory() as made:
        before = identity(write_bare_adapter(Path(made) / "a"))
        after = identity(write_bare_adapter(Path(made) / "b", **config))
    assert (before == after) is all(number % 2 == 0 for number in changes.values())


def test_shards_that_transformers_writes(base, tmp_path):
    """PEFT writes one file always; transformers' own save splits an adapter."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="2KB")
    assert not (tmp_path / "many" / FILE).exists()
    one, many = read_adapter(tmp_path / "one"), read_adapter(tmp_path / "many")
    assert len(many.weight_files) > 2
    assert many.tensors == one.tensors
    assert content_identity(many) == content_identity(one)
    # The store makes one file of it again, so that PEFT reads it.
    source = str(tmp_path / "many")
    entry = AdapterStore(tmp_path / "store").add("mine", find_source(source), source).entry
    assert [file.name for file in entry.path.glob("*safetensors*")] == [FILE]
    assert content_identity(read_adapter(entry.path)) == entry.identity == content_identity(one)
    model.load_adapter(str(entry.path), adapter_name="again")


def test_shards_that_are_not_whole(tmp_path):
    folder = write_bare_adapter(tmp_path / "a")
    tensors = bare_tensors()
    first = dict(list(tensors.items())[:2])
    rest = dict(list(tensors.items())[2:])
    for index in (None, "adapter_model.safetensors.index.json", "model.safetensors.index.json"):
        write_shards(folder, [first, rest], index)
        assert read_adapter(folder).tensors.keys() == tensors.keys()
    last = folder / "adapter_model-00002-of-00002.safetensors"
    save_file(first, last)
    with pytest.raises(AdapterError, match="twice"):
        read_adapter(folder)
    save_file({"other": torch.ones(1)}, last)
    with pytest.raises(AdapterError, match="disagree on 3 tensors"):
        read_adapter(folder)
    last.unlink()
    with pytest.raises(AdapterError, match="incomplete: it has 1 shards of 00002"):
        read_adapter(folder)
    for file in folder.glob("*.index.json"):
        file.write_text("[]")
    write_shards(folder, [first, rest])
    with pytest.raises(AdapterError, match=r"index\.json cannot be read"):
        read_adapter(folder)
