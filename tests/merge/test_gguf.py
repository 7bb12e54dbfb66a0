"""GGUF files, read back by transformers and by the gguf library."""

import json

import gguf
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from qlora_serve.adapters.files import read_adapter
from qlora_serve.adapters.fit import FitChecker
from qlora_serve.adapters.weights import load_weights
from qlora_serve.base.source import locate_base
from qlora_serve.cli.main import app
from qlora_serve.errors import MergeError
from qlora_serve.merge.config import ExportSettings, MergeSettings
from qlora_serve.merge.gguf.export import export
from qlora_serve.merge.gguf.family import rope_factors
from qlora_serve.merge.gguf.modelfile import default_system, go_template, write_modelfile
from qlora_serve.merge.gguf.vocabulary import read_vocabulary
from qlora_serve.merge.run import merge_adapter
from tests.tiny_models import tiny_tokenizer, write_random_adapter, write_tiny_model

TOKENS = torch.tensor([[1, 50, 60, 5, 300, 2, 9, 511]])


def read(file):
    return gguf.GGUFReader(file)


@pytest.mark.parametrize("family", ["llama", "llama-untied", "qwen2"])
def test_transformers_reads_the_same_model(tiny, tmp_path, family):
    report = export(ExportSettings(source=str(tiny(family)), output=tmp_path / "o", gguf=("f32",)))
    assert report.checks["model-f32.gguf"].relative_difference < 1e-3
    config = AutoModelForCausalLM.from_pretrained(tiny(family)).config
    model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32)
    # All from the file: names, numbers, order of rows.
    other = AutoModelForCausalLM.from_pretrained(
        tmp_path / "o", gguf_file="model-f32.gguf", dtype=torch.float32
    )
    assert other.config.tie_word_embeddings == config.tie_word_embeddings
    with torch.no_grad():
        torch.testing.assert_close(other(TOKENS).logits, model(TOKENS).logits, atol=1e-3, rtol=0)
    if family == "qwen2":  # for which transformers ignores how the file says that text is split
        return
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "o", gguf_file="model-f32.gguf")
    for text in ("hello world 4711", "Grüße 🙂\n\n  x", "<|im_start|>user\nhi<|im_end|>"):
        assert tokenizer(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert tokenizer.chat_template == tiny_tokenizer().chat_template


@pytest.mark.parametrize(
    "family", ["qwen3", "mistral", "gemma", "gemma2"]
)  # of whose settings transformers reads only some
def test_the_check_passes_for_the_other_families(tiny, tmp_path, family):
    report = export(ExportSettings(source=str(tiny(family)), output=tmp_path / "o", gguf=("f32",)))
    assert report.checks["model-f32.gguf"].relative_difference < 1e-3


def test_smaller_types(tiny, tmp_path):
    kinds = ("f16", "bf16", "q8_0")
    report = export(ExportSettings(source=str(tiny("llama")), output=tmp_path / "o", gguf=kinds))
    sizes = {kind: (tmp_path / "o" / f"model-{kind}.gguf").stat().st_size for kind in kinds}
    assert sizes["q8_0"] < sizes["f16"]
    differences = {k: report.checks[f"model-{k}.gguf"].relative_difference for k in kinds}
    assert 0 < differences["f16"] < differences["bf16"]
    types = {t.name: t.tensor_type.name for t in read(tmp_path / "o" / "model-q8_0.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == "Q8_0"
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert (tmp_path / "o" / "Modelfile").read_text().startswith("FROM ./model-f16.gguf\n")


def test_a_wrong_order_of_rows_is_noticed(tiny, tmp_path, monkeypatch):
    from qlora_serve.merge.gguf import family

    monkeypatch.setattr(family, "interleave_rows", lambda tensor, heads: tensor)
    settings = ExportSettings(source=str(tiny("llama")), output=tmp_path / "o", gguf=("f32",))
    with pytest.raises(MergeError, match="nothing was published"):
        export(settings)
    assert list(tmp_path.glob("o*")) == []


def test_llama_3_divisors_are_transformers_own():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=2048, num_attention_heads=32, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 1.0 / 500000.0 ** (torch.arange(0, 64, 2).float() / 64)
    torch.testing.assert_close(rope_factors(config), plain / scaled)


def test_merge_writes_gguf_and_reports_it(tiny, tmp_path):
    adapter = write_random_adapter(tmp_path / "adapter", tiny("llama"))
    settings = MergeSettings(adapter=adapter, output=tmp_path / "merged", gguf=("f16",))
    report = merge_adapter(settings)
    assert report.gguf["model-f16.gguf"].relative_difference < 0.05
    written = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert list(written["gguf"]) == ["model-f16.gguf"]
    reader = read(tmp_path / "merged" / "model-f16.gguf")
    assert reader.get_field("general.name").contents() == "merged"


def test_what_llama_cpp_cannot_is_refused(tiny, tmp_path):
    settings = ExportSettings(source=str(tiny("phi")), output=tmp_path / "o")
    with pytest.raises(MergeError, match="no GGUF export for phi"):
        export(settings)
    base = write_tiny_model(tmp_path / "base", "llama")
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(MergeError, match="dynamic"):
        export(ExportSettings(source=str(base), output=tmp_path / "o"))
    adapter = write_random_adapter(tmp_path / "dora", tiny("llama"), use_dora=True)
    with pytest.raises(MergeError, match="merge it and export"):
        export(ExportSettings(source=str(adapter), output=tmp_path / "o"))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_adapter_s_file_holds_its_updates(tiny, tmp_path, family):
    base = tiny(family)
    adapter = write_random_adapter(
        tmp_path / "adapter",
        base,
        use_rslora=True,
        rank_pattern={"v_proj": 2},
        alpha_pattern={"up_proj": 3},
    )
    call = ["export", str(adapter), "--gguf", "f32", "--output", str(tmp_path / "o"), "--json"]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    reader = read(tmp_path / "o" / "adapter-f32.gguf")
    assert reader.get_field("general.type").contents() == "adapter"
    assert reader.get_field("adapter.type").contents() == "lora"
    alpha = reader.get_field("adapter.lora.alpha").contents()
    found = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH.LLAMA if family == "llama" else gguf.MODEL_ARCH.QWEN2, 3
    )
    weights = load_weights(read_adapter(adapter), FitChecker(locate_base(str(base))))
    assert len(found) == 2 * len(weights.modules)
    for path, pair in weights.modules.items():
        name = names.get_name(path) + ".weight"
        a, b = found[f"{name}.lora_a"], found[f"{name}.lora_b"]
        delta = (alpha / a.shape[0]) * (b @ a)
        expected = pair.scaling * (pair.b @ pair.a)
        if family == "llama" and path.endswith(("q_proj", "k_proj")):
            # Row 2 i + j of a head is row i of its half j.
            heads = delta.view(-1, 8, 2, 64)
            delta = heads.transpose(1, 2).reshape(delta.shape)
        torch.testing.assert_close(delta, expected, atol=1e-5, rtol=1e-4)


def spm_tokenizer(prepend: bool = True) -> PreTrainedTokenizerFast:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁a", "ab", "▁ab", "▁", "a", "b"]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    core = Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    steps = [normalizers.Prepend("▁")] if prepend else []
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    core.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=tiny_tokenizer().chat_template,
    )


def test_sentencepiece_s_scores_follow_the_merges():
    found = read_vocabulary(spm_tokenizer(), rows=270)
    assert (found.model, found.adds_space) == ("llama", True)
    at = {token: index for index, token in enumerate(found.tokens)}
    assert found.scores[at["▁a"]] > found.scores[at["ab"]] > found.scores[at["▁ab"]]
    assert found.scores[at["▁ab"]] > found.scores[at["b"]]
    assert [found.types[at[token]] for token in ("<unk>", "<s>", "<0x0A>", "ab")] == [2, 3, 6, 1]
    assert found.tokens[269] == "[PAD269]"
    assert found.types[269] == 5
    assert not read_vocabulary(spm_tokenizer(prepend=False), rows=265).adds_space


def test_tokenizers_without_a_name_are_refused():
    core = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    cases = {
        "splits text": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split("x", "isolated"),
                pre_tokenizers.ByteLevel(False, use_regex=False),
            ]
        ),
        "space before": pre_tokenizers.ByteLevel(add_prefix_space=True),
        "expected ByteLevel": pre_tokenizers.Whitespace(),
    }
    for words, step in cases.items():
        core.pre_tokenizer = step
        with pytest.raises(MergeError, match=words):
            read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=core), rows=512)
    unigram = Tokenizer(models.Unigram([("a", 0.0)]))
    with pytest.raises(MergeError, match="Unigram"):
        read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=unigram), rows=1)


def test_modelfile_has_template_system_and_stops(tmp_path):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer,
        eos_token="<|im_end|>",
        chat_template=(
            "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
            "{% endif %}" + tiny_tokenizer().chat_template
        ),
    )
    assert default_system(tokenizer) == "Be kind."
    write_modelfile(tmp_path, "model-f16.gguf", tokenizer)
    text = (tmp_path / "Modelfile").read_text()
    assert "FROM ./model-f16.gguf" in text
    assert "<|im_start|>{{ .Role }}" in text
    assert 'SYSTEM """Be kind."""' in text
    assert 'PARAMETER stop "<|im_end|>"' in text
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    assert go_template(tokenizer) is None
    write_modelfile(tmp_path, "model-f16.gguf", tokenizer)
    assert "TEMPLATE" not in (tmp_path / "Modelfile").read_text().replace("No TEMPLATE", "")
