"""Every method's adapter is right on the base as it was, by PEFT's own loading."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_serve.base.load import load_base
from qlora_serve.errors import ConfigError, QloraServeError, TrainError
from qlora_serve.train import trainer as trainer_module
from qlora_serve.train.config import TrainSettings
from qlora_serve.train.dataset import probe_ids
from qlora_serve.train.log import read_log
from qlora_serve.train.prepare import read_run_data
from qlora_serve.train.run import TrainResult, train
from tests.tiny_models import write_tiny_model
from tests.train.chats import SOME_CHATS, write_chats


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base") / "tiny", "qwen2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl", SOME_CHATS)


def _settings(base: Path, data: Path, output: Path, **settings: Any) -> TrainSettings:
    chosen = {"learning_rate": 1e-2, "rank": 4, "alpha": 8, "device": "cpu", "max_steps": 3}
    return TrainSettings(base=str(base), data=data, output=output, **(chosen | settings))


def _train(*arguments: Any, **settings: Any) -> tuple[TrainResult, list[str]]:
    lines: list[str] = []
    return train(_settings(*arguments, **settings), lines.append), lines


@torch.no_grad()
def _loss(model: Any, tokens: torch.Tensor) -> float:
    return float(model.eval()(input_ids=tokens, labels=tokens).loss)


METHODS: list[Any] = [
    pytest.param(*({"use_rslora": True}, {"use_rslora": True, "r": 4}), marks=pytest.mark.slow),
    ({"use_dora": True}, {"use_dora": True}),
    ({"init": "pissa"}, {"r": 8, "lora_alpha": 16, "init_lora_weights": True}),
    pytest.param(
        *({"init": "olora", "use_rslora": True}, {"r": 8, "use_rslora": True}),
        marks=pytest.mark.slow,
    ),
    ({"init": "eva"}, {"init_lora_weights": "eva"}),
    (
        {"rank_pattern": ["q_proj=2", "down_proj=8"], "alpha_pattern": {"q_proj": 1}},
        {"rank_pattern": {"q_proj": 2, "down_proj": 8}, "alpha_pattern": {"q_proj": 1}},
    ),
    ({"bias": "all"}, {"bias": "all"}),
    pytest.param(
        *({"bias": "lora_only", "target_modules": "q_proj"}, {"bias": "lora_only"}),
        marks=pytest.mark.slow,
    ),
    pytest.param(
        *({"layers_to_transform": [1]}, {"layers_to_transform": [1]}), marks=pytest.mark.slow
    ),
    pytest.param(
        *({"modules_to_save": ["norm"]}, {"modules_to_save": ["norm"]}), marks=pytest.mark.slow
    ),
    ({"trainable_tokens": ["<|im_end|>", "<|im_start|>"]}, {"trainable_token_indices": [1, 2]}),
    ({"loraplus_ratio": 8, "optimizer": "adamw-8bit"}, {}),
    pytest.param(*({"optimizer": "adafactor"}, {}), marks=pytest.mark.slow),
    pytest.param(*({"optimizer": "lion-8bit", "learning_rate": 1e-3}, {}), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("method", "config"), METHODS, ids=lambda m: "-".join(map(str, m)))
def test_a_method(
    base: Path, data: Path, tmp_path: Path, method: dict[str, Any], config: dict[str, Any]
) -> None:
    result, _ = _train(base, data, tmp_path / "out", **method)
    saved = json.loads((result.path / "adapter_config.json").read_text())
    assert {name: saved[name] for name in config} == config
    assert result.metrics["last_loss"] < result.metrics["first_loss"]
    # The verification before publishing compares logits; here only that the way back is PEFT's.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens = torch.tensor([result.manifest.probes[0]])
    before = _loss(model, tokens)
    assert abs(_loss(PeftModel.from_pretrained(model, result.path), tokens) - before) > 1e-3


def test_a_start_from_the_bases_weights_learns_what_peft_would(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The converted adapter on the base as it was gives the logits of the trained model."""
    logits: list[torch.Tensor] = []
    probe = torch.arange(3, 40)[None]
    tensors_of = trainer_module.OurTrainer.published_tensors

    def remember(self: Any) -> Any:
        with torch.no_grad():
            logits.append(self.model.eval()(input_ids=probe).logits)
        return tensors_of(self)

    monkeypatch.setattr(trainer_module.OurTrainer, "published_tensors", remember)
    result, _ = _train(base, data, tmp_path / "out", init="pissa")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        found = PeftModel.from_pretrained(model, result.path)(input_ids=probe).logits
    torch.testing.assert_close(found, logits[0], rtol=1e-4, atol=1e-4)


def test_loftq_begins_closer_to_the_unquantized_base(
    base: Path, data: Path, tmp_path: Path
) -> None:
    # A rate of nearly nothing leaves the start as it was.
    settings = {"quantization": "nf4", "learning_rate": 1e-12, "max_steps": 1, "rank": 16}
    result, _ = _train(base, data, tmp_path / "out", init="loftq", **settings)
    assert result.manifest.base.unquantized is None
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens = torch.arange(3, 60)[None]
    rounded = load_base(str(base), "nf4", "float32", "cpu").model
    with torch.no_grad():
        expected = whole(input_ids=tokens).logits
        plain = (rounded(input_ids=tokens).logits - expected).norm()
        adapted = PeftModel.from_pretrained(rounded, result.path)
        helped = (adapted(input_ids=tokens).logits - expected).norm()
    assert helped < 0.8 * plain


@pytest.mark.parametrize("double", [True, False])
def test_double_quantization_is_a_choice(
    base: Path, data: Path, tmp_path: Path, double: bool
) -> None:
    settings = {"quantization": "nf4", "double_quantization": double, "max_steps": 1}
    result, _ = _train(base, data, tmp_path / "out", **settings)
    assert result.manifest.recipe["double_quantization"] is double


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_full_fine_tuning_writes_a_model(
    base: Path, data: Path, tmp_path: Path, dtype: str
) -> None:
    settings = {"method": "full", "learning_rate": 1e-3, "dtype": dtype, "max_steps": 8}
    result, lines = _train(base, data, tmp_path / "out", **settings)
    assert result.metrics["last_loss"] < 0.8 * result.metrics["first_loss"]
    model = AutoModelForCausalLM.from_pretrained(result.path)
    assert str(model.dtype) == f"torch.{dtype}"
    assert AutoTokenizer.from_pretrained(result.path).chat_template
    assert (result.path / "generation_config.json").is_file()
    plain = load_file(base / "model.safetensors")
    saved = load_file(result.path / "model.safetensors")
    assert saved.keys() == plain.keys()
    assert all(not torch.equal(saved[name].float(), plain[name]) for name in saved)
    assert any(f"qlora-serve serve {result.path}" in line for line in lines)
    # A recipe may serve both methods; what is not used is said.
    assert "note: --method full has no adapter, and no use for rank, alpha" in lines


def test_evaluation_best_checkpoint_and_early_stopping(
    base: Path, data: Path, tmp_path: Path
) -> None:
    held_out = write_chats(tmp_path / "held.jsonl", [SOME_CHATS[0], SOME_CHATS[3], SOME_CHATS[4]])
    # So large a rate overshoots within a few steps, whatever the order of the rows.
    settings = {
        "eval_data": held_out, "eval_every": 2, "load_best": True, "early_stopping": 2,
        "learning_rate": 5.0, "max_steps": 40, "schedule": "constant", "keep": 1,
        "micro_batch": 2, "max_grad_norm": 100,
    }  # fmt: skip
    result, _ = _train(base, data, tmp_path / "out", **settings)
    log = read_log(result.path)
    best = log.best
    assert best is not None
    assert len(log.steps) == best.step + 4 < 40
    assert result.metrics["published_step"] == best.step
    kept = {path.name for path in (tmp_path / "out.checkpoints").iterdir()}
    assert f"checkpoint-{best.step}" in kept
    # By transformers' own loss, on each held-out row, weighted by its tokens.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, result.path).eval()
    total = count = 0.0
    from qlora_serve.train.data import read_chats
    from qlora_serve.train.dataset import TokenizeSettings, tokenize_usable

    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = tokenize_usable(read_chats(held_out), TokenizeSettings(tokenizer, 512, {2})).kept()
    for row in rows:
        labels = [t if c else -100 for t, c in zip(row.input_ids, row.trained, strict=True)]
        tokens = sum(label != -100 for label in labels[1:])
        with torch.no_grad():
            loss = adapted(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([labels]))
        total, count = total + float(loss.loss) * tokens, count + tokens
    assert best.loss == pytest.approx(total / count, rel=1e-4)


def test_samples_and_log(base: Path, data: Path, tmp_path: Path) -> None:
    settings = {"sample_prompt": ["hello", "question"], "sample_tokens": 5, "eval_split": 0.25}
    result, _ = _train(base, data, tmp_path / "out", eval_every=2, max_steps=4, **settings)
    log = read_log(result.path)
    assert [(s.step, s.prompt) for s in log.samples] == [
        (step, prompt) for step in (0, 2, 4) for prompt in ("hello", "question")
    ]
    assert [e.step for e in log.evaluations] == [2, 4]
    assert [s.step for s in log.steps] == [1, 2, 3, 4]
    assert all(step.tokens > 0 and step.grad_norm > 0 for step in log.steps)
    assert log.peak_memory_bytes > 50e6
    assert log.environment["processes"] == 1
    # Looking changes nothing.
    unseen, _ = _train(base, data, tmp_path / "unseen", max_steps=4, eval_split=0.25)
    assert read_log(unseen.path).losses == log.losses
    # A merge is to be proven on what was not trained on.
    chosen = _settings(base, data, tmp_path / "read", eval_split=0.25)
    held_out = read_run_data(chosen, chosen.seed).evaluation
    assert held_out is not None
    tokenizer = load_base(str(base), device="cpu").tokenizer
    assert result.manifest.probes == [probe_ids(tokenizer, row) for row in held_out.rows]
    assert result.manifest.probes_from == "held-out rows"


def test_tokens_that_the_base_never_learnt_are_proposed(
    base: Path, data: Path, tmp_path: Path
) -> None:
    def proposals(**settings: Any) -> list[str]:
        _, lines = _train(base, data, tmp_path / str(len(settings)), max_steps=1, **settings)
        return [line for line in lines if "has never learnt" in line]

    (line,) = proposals()  # transformers starts the padding token's row at zero
    assert "<|im_end|>" in line
    assert "--modules-to-save embed_tokens --modules-to-save lm_head" in line
    assert "--trainable-tokens '<|im_end|>'" in line
    assert not proposals(trainable_tokens=["<|im_end|>"])
    assert not proposals(modules_to_save=["embed_tokens", "lm_head"], rank=2)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "full", "quantization": "nf4"}, "which nf4 ones do not allow"),
        ({"method": "full", "use_dora": True}, "leave out use_dora"),
        ({"init": "pissa", "quantization": "nf4"}, "would round differently"),
        ({"init": "pissa", "modules_to_save": ["lm_head"]}, "cannot be converted"),
        ({"init": "loftq"}, "needs --quantization nf4"),
        ({"load_best": True}, "needs --eval-every"),
        ({"early_stopping": 2}, "needs --eval-every"),
        ({"rank_pattern": ["q_proj"]}, "expected MODULE=NUMBER"),
        ({"rank_pattern": {"q_proj": 0}}, "must be more than 0"),
        ({"nodes": 2}, "need --rendezvous"),
        ({"node_rank": 1}, "for --nodes 2 or more"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TrainSettings(base="b", data="d", output=Path("o"), **settings)


@pytest.mark.parametrize(
    ("settings", "error", "reason"),
    [
        ({"rank_pattern": {"query": 2}}, ConfigError, "rank_pattern 'query' match nothing"),
        (
            {"modules_to_save": ["head"]},
            ConfigError,
            "modules_to_save 'head' match nothing.*embed_tokens",
        ),
        ({"layers_to_transform": [3]}, ConfigError, "layers 0 to 2, not 3"),
        ({"trainable_tokens": ["nothing"]}, ConfigError, "'nothing' are no tokens of this base"),
        ({"optimizer": "paged-adamw-8bit"}, ConfigError, "use adamw-8bit"),
        ({"liger": True}, ConfigError, "written for GPUs"),
        ({"eval_every": 2}, ConfigError, "no rows are held out"),
        ({"resume": True}, QloraServeError, "holds no whole checkpoint"),
    ],
)
def test_what_does_not_fit_leaves_nothing(
    base: Path,
    data: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    error: type[QloraServeError],
    reason: str,
) -> None:
    with pytest.raises(error, match=reason) as caught:
        _train(base, data, tmp_path / "out", **settings)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_explodes_names_the_last_good_checkpoint(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = trainer_module.Layout.loss

    def explode(self: Any, model: Any, inputs: Any) -> Any:
        explode.calls += 1  # type: ignore[attr-defined]
        return loss(self, model, inputs) * (float("inf") if explode.calls == 4 else 1)  # type: ignore[attr-defined]

    explode.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(trainer_module.Layout, "loss", explode)
    # The third checkpoint's weights are those that gave it.
    with pytest.raises(TrainError, match=r"is inf at step 4 of 9.*checkpoint is .*checkpoint-2"):
        _train(base, data, tmp_path / "out", max_steps=9, save_every=1)


def test_a_run_in_which_nothing_learns_stops(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = trainer_module.Layout.loss

    def cut(self: Any, model: Any, inputs: Any) -> Any:
        return loss(self, model, inputs) * 0.0 + 5.0

    monkeypatch.setattr(trainer_module.Layout, "loss", cut)
    with pytest.raises(TrainError, match="every gradient is zero at step 1 of 3"):
        _train(base, data, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
