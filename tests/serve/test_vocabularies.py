"""Adapters with tokens of their own, beside adapters without and the base, in one batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mixed_batch import load_residents, mixed_rows
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import write_random_adapter, write_tiny_model
from transformers import AutoModelForCausalLM

from qlora_serve.adapters.files import read_adapter
from qlora_serve.adapters.fit import FitChecker
from qlora_serve.adapters.weights import load_weights
from qlora_serve.base.load import load_base
from qlora_serve.base.source import locate_base
from qlora_serve.errors import AdapterError
from qlora_serve.serve.engine.runner import Runner

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

TOLERANCE = 1e-4
BASE_TOKENS = 512
_FEW = ["q_proj", "v_proj"]
ENLARGED: dict[str, dict[str, Any]] = {
    "plain": {"vocabulary": 520},
    "saved": {"vocabulary": 515, "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved-embedding": {"vocabulary": 515, "modules_to_save": ["embed_tokens"]},
    "saved-tied": {
        "vocabulary": 576,
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "embedding": {"vocabulary": 528, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "embedding-dora": {
        "vocabulary": 528,
        "target_modules": ["embed_tokens", "lm_head", "q_proj"],
        "use_dora": True,
    },
    "tokens": {"vocabulary": 520, "trainable_token_indices": [10, 512, 515]},
}
USUAL: dict[str, dict[str, Any]] = {
    "usual": {},
    "usual-saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "usual-tokens": {"trainable_token_indices": [10, 11]},
}


def _write(folder: Path, family: str, kinds: dict[str, dict]) -> tuple[Path, dict[str, Path]]:
    base = write_tiny_model(folder / "base", family)
    return base, {
        name: write_random_adapter(
            folder / name, base, seed=number, **{"target_modules": _FEW, **settings}
        )
        for number, (name, settings) in enumerate(kinds.items())
    }


def _alone(base: Path, adapter: Path | None, vocabulary: int | None) -> Any:
    """PEFT on the resized base."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model.eval() if adapter is None else PeftModel.from_pretrained(model, adapter).eval()


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "llama-untied",
        pytest.param("gemma2", marks=pytest.mark.slow),  # scaled embeddings, bent logits
        pytest.param("qwen2", marks=pytest.mark.slow),
        pytest.param("mistral", marks=pytest.mark.slow),
        pytest.param("phi", marks=pytest.mark.slow),  # with a bias for each token
    ],
)
@torch.inference_mode()
def test_enlarged_vocabularies_match_peft_on_the_resized_base(family: str, tmp_path: Path) -> None:
    base, paths = _write(tmp_path, family, ENLARGED | USUAL)
    runner = Runner(load_base(str(base), dtype="float32"))
    residents = load_residents(runner, paths)
    lengths = {"base": 9} | {name: 6 + 5 * number % 31 for number, name in enumerate(paths)}
    prompts = {
        name: [settings["vocabulary"] - 1, 12, BASE_TOKENS, 33, settings["vocabulary"] - 2]
        for name, settings in ENLARGED.items()
    }
    found = mixed_rows(runner, residents, lengths, prompts=prompts)
    for name, one in found.items():
        vocabulary = ENLARGED.get(name, {}).get("vocabulary")
        known = vocabulary or BASE_TOKENS
        assert runner.vocabulary(residents.get(name)) == known
        alone = _alone(base, paths.get(name), vocabulary)
        expected = alone(torch.tensor([one.tokens])).logits[0, one.first :]
        assert expected.shape[1] == known
        error = (one.logits[:, :known] - expected).abs().max().item()
        assert error < TOLERANCE, f"{name}: {error}"
        # The columns of others' tokens are never sampled.
        beyond = one.logits.softmax(-1)[:, known:]
        assert one.logits.isfinite().all()
        assert (beyond == 0).all()


@pytest.mark.parametrize(
    ("family", "settings", "dropped", "words"),
    [
        ("llama-untied", {}, ("lm_head.weight",), "no new rows for lm_head"),
        ("llama-untied", {}, ("embed_tokens.weight",), "no new rows for model.embed_tokens"),
        ("phi", {}, ("lm_head.bias",), "no biases for the new tokens of lm_head"),
        (
            "llama",
            {"trainable_token_indices": [10, 515]},
            ("base_layer.weight", "lm_head.token_adapter.trainable_tokens_delta"),
            "trains token 515, and the base has 512",
        ),
    ],
)
def test_what_cannot_be_reproduced_is_refused(
    family: str, settings: dict, dropped: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    base, paths = _write(tmp_path, family, {"it": {"vocabulary": 520, **settings}})
    file = paths["it"] / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if not n.endswith(dropped)}, file)
    runner = Runner(load_base(str(base), dtype="float32"))
    with pytest.raises(AdapterError, match=words):
        load_residents(runner, paths)


def test_two_sizes_are_refused(tmp_path: Path) -> None:
    base, paths = _write(tmp_path, "llama-untied", {"it": {"vocabulary": 520}})
    file = paths["it"] / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("lm_head.weight"))
    tensors[name] = tensors[name][:516].contiguous()
    save_file(tensors, file)
    with pytest.raises(AdapterError, match="embeddings of 516 and 520 tokens"):
        load_weights(read_adapter(paths["it"]), FitChecker(locate_base(str(base))))


def test_a_smaller_vocabulary_is_refused(tmp_path: Path) -> None:
    base, paths = _write(tmp_path, "llama", {"it": {"vocabulary": 500}})
    with pytest.raises(AdapterError, match="its vocabulary has 500 tokens"):
        load_weights(read_adapter(paths["it"]), FitChecker(locate_base(str(base))))
