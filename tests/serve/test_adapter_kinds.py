"""Every kind of adapter, mixed in one batch, gives what PEFT gives for it alone."""

from pathlib import Path

import pytest
import torch
from adapter_kinds import adapter_kinds
from gptq_models import write_autogptq_model, write_dequantized, write_gptq_model
from int8_rows import row_by_row
from mixed_batch import check_against_peft, give_blocks, load_residents, mixed_rows, new_sequence
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import write_random_adapter, write_tiny_model

from qlora_serve.base.load import load_base
from qlora_serve.errors import AdapterError
from qlora_serve.serve.engine.replaced import AdapterModule
from qlora_serve.serve.engine.runner import Runner
from qlora_serve.serve.engine.scheduler import Chunk

TOLERANCE = 1e-4  # float32, on logits of magnitude about 10

_FEW = ["q_proj", "v_proj"]
# In the batches of test_engine_exactness.py and test_vocabularies.py.
_ELSEWHERE = {"rslora", "patterns", "some-targets", "some-layers", "enlarged"}
_ELSEWHERE |= {"enlarged-embedding-dora"}


def _kinds(family: str, *names: str, quantized: bool = False) -> dict[str, dict]:
    """Settings by name: of these kinds, else of all that the base can carry."""
    left_out = _ELSEWHERE | ({"saved-linear"} if quantized else set())
    every = adapter_kinds(family)
    return {name: every[name] for name in names or every if name not in left_out}


def _write(folder: Path, family: str, kinds: dict[str, dict]) -> tuple[Path, dict[str, Path]]:
    base = write_tiny_model(folder / "base", family)
    return base, {
        name: write_random_adapter(folder / name, base, seed=number, **settings)
        for number, (name, settings) in enumerate(kinds.items())
    }


def _lengths(paths: dict[str, Path]) -> dict[str, int]:
    return {"base": 31} | {name: 6 + 5 * number % 31 for number, name in enumerate(paths)}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("family", ["llama", "llama-untied", "phi", "gemma2", "qwen2"])
def test_every_kind_matches_peft(family: str, tmp_path: Path) -> None:
    base, paths = _write(tmp_path, family, _kinds(family))
    runner = Runner(load_base(str(base), dtype="float32"))
    found = mixed_rows(runner, load_residents(runner, paths), _lengths(paths))
    check_against_peft(base, paths, found, TOLERANCE, differs_by=0.1)


def _quantized_reference(quantization: str, dtype: str):
    def load(base: Path, adapter: Path | None):
        model = load_base(str(base), quantization=quantization, dtype=dtype).model
        row_by_row(model)  # of int8
        return model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()

    return load


# The engine's sums are in another order than PEFT's, so that results differ by about 1e-7 of
# their size. NF4 keeps that so: its weights are fixed and inputs stay float32. int8 rounds its
# inputs to 255 steps, and a value on the edge between two steps falls to the other side now and
# then, which moves a logit by up to 0.1. bfloat16 has 8 bits: logits of magnitude 4 are 0.03 apart,
# after three layers.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("quantization", "dtype", "tolerance"),
    [("nf4", "float32", 1e-4), ("int8", "float32", 0.1), ("none", "bfloat16", 0.15)],
)
def test_every_kind_on_other_bases(
    quantization: str, dtype: str, tolerance: float, tmp_path: Path
) -> None:
    kinds = _kinds("llama", quantized=quantization != "none")
    base, paths = _write(tmp_path, "llama", kinds)
    runner = Runner(load_base(str(base), quantization=quantization, dtype=dtype))
    found = mixed_rows(runner, load_residents(runner, paths), _lengths(paths), decode=2)
    reference = _quantized_reference(quantization, dtype)
    check_against_peft(base, paths, found, tolerance, max(0.1, 2 * tolerance), reference)


# PEFT refuses DoRA on GPTQ layers; on the dequantized float32 base it does not.
_PEFT_DOES_ON_GPTQ = ("lora", "saved-embedding", "tokens", "lora-bias")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"symmetric": False, "by_activity": True}),
        pytest.param("llama-untied", {}, marks=pytest.mark.slow),
        pytest.param("qwen2", {"bits": 8, "group_size": -1}, marks=pytest.mark.slow),
        pytest.param("qwen3", {"group_size": 64}, marks=pytest.mark.slow),
        pytest.param("mistral", {"bits": 8, "symmetric": False}, marks=pytest.mark.slow),
        pytest.param("gemma2", {"bits": 3}, marks=pytest.mark.slow),
        pytest.param("phi", {"symmetric": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_kind_on_gptq(family: str, settings: dict, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel")
    base, paths = _write(tmp_path, family, _kinds(family, quantized=True))
    gptq = write_gptq_model(tmp_path / "gptq", base, **settings)
    runner = Runner(load_base(str(gptq)))
    found = mixed_rows(runner, load_residents(runner, paths), _lengths(paths), decode=2)

    if settings.get("bits") != 3:  # the helper does not unpack codes that span words
        dense = write_dequantized(tmp_path / "dense", gptq, base)
        check_against_peft(dense, paths, found, TOLERANCE, differs_by=0.1)
    some = {name: path for name, path in paths.items() if name in _PEFT_DOES_ON_GPTQ}
    reference = _quantized_reference("none", "float32")
    expected = {name: found[name] for name in ("base", *some)}
    check_against_peft(gptq, some, expected, TOLERANCE, 0.1, reference)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("in_config", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_adapters_on_autogptqs_format_without_the_kernels(
    in_config: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gptqmodel")
    base, paths = _write(tmp_path, "llama", _kinds("llama", "lora", "dora"))
    gptq = write_gptq_model(tmp_path / "gptq", base, symmetric=False)
    older = write_autogptq_model(tmp_path / "older", gptq, in_config)
    monkeypatch.setattr("qlora_serve.serve.engine.runner.load_kernels", lambda: None)
    runner = Runner(load_base(str(older)))
    found = mixed_rows(runner, load_residents(runner, paths), _lengths(paths), decode=2)
    dense = write_dequantized(tmp_path / "dense", gptq, base)
    check_against_peft(dense, paths, found, TOLERANCE, differs_by=0.1)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_bfloat16_is_as_near_to_float32_as_peft_is(tmp_path: Path) -> None:
    base, paths = _write(tmp_path, "llama", _kinds("llama", "lora", "dora", "embedding"))
    runner = Runner(load_base(str(base), dtype="bfloat16"))
    found = mixed_rows(runner, load_residents(runner, paths), _lengths(paths))
    for name, path in paths.items():
        tokens = torch.tensor([found[name].tokens])
        exact, rounded = (
            _quantized_reference("none", dtype)(base, path)(tokens).logits[0, found[name].first :]
            for dtype in ("float32", "bfloat16")
        )
        error = (found[name].logits.float() - exact).pow(2).mean().sqrt()
        assert error < 1.5 * (rounded.float() - exact).pow(2).mean().sqrt(), name


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@torch.inference_mode()
def test_loading_while_others_decode_changes_nothing_for_them(tmp_path: Path) -> None:
    """Modules are wrapped between two steps of running sequences."""
    names = ("lora", "saved", "embedding-dora")
    base, paths = _write(tmp_path, "phi", _kinds("phi", *names))

    def decode(load_between: bool) -> torch.Tensor:
        runner = Runner(load_base(str(base), dtype="float32"))
        residents = load_residents(runner, {"lora": paths["lora"]})
        prompt = list(range(20, 40))
        sequences = [new_sequence(prompt, None), new_sequence(prompt, residents["lora"])]
        give_blocks(runner, sequences, 4)
        rows = [runner.forward([Chunk(s, 0, len(prompt)) for s in sequences])]
        for step in range(4):
            if load_between and step == 2:
                load_residents(runner, {name: paths[name] for name in names[1:]})
            for sequence in sequences:
                sequence.generated.append(50 + step)
            rows.append(runner.forward([Chunk(s, s.length - 1, 1) for s in sequences]))
        wrapped = [m for m in runner.base.model.modules() if isinstance(m, AdapterModule)]
        assert bool(wrapped) == load_between
        return torch.stack(rows)

    assert decode(load_between=True).equal(decode(load_between=False))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("family", "quantization", "settings", "words"),
    [
        ("qwen3", "none", {"modules_to_save": ["q_norm"]}, "norm of each attention head"),
        ("llama", "nf4", {"modules_to_save": ["k_proj"]}, "quantized"),
        ("llama", "int8", {"modules_to_save": ["k_proj"]}, "quantized"),
        ("llama", "gptq", {"modules_to_save": ["k_proj"]}, "quantized"),
    ],
)
def test_what_the_base_cannot_carry_is_refused(
    family: str, quantization: str, settings: dict, words: str, tmp_path: Path
) -> None:
    base, paths = _write(tmp_path, family, {"it": settings | {"target_modules": _FEW}})
    if quantization == "gptq":
        base, quantization = write_gptq_model(tmp_path / "gptq", base), "none"
    runner = Runner(load_base(str(base), quantization=quantization, dtype="float32"))
    with pytest.raises(AdapterError, match=words):
        load_residents(runner, paths)
    assert not any(isinstance(m, AdapterModule) for m in runner.base.model.modules())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_embedding_lora_of_another_embedding_is_refused(tmp_path: Path) -> None:
    base, paths = _write(tmp_path, "llama", {"it": adapter_kinds("llama")["embedding-dora"]})
    file = paths["it"] / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("base_layer.weight"))
    tensors[name][7] += 0.01
    save_file(tensors, file)
    runner = Runner(load_base(str(base), dtype="float32"))
    with pytest.raises(AdapterError, match=r"another weight of model\.embed_tokens"):
        load_residents(runner, paths)
