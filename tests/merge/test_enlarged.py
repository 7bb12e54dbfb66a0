"""Adapters with more tokens than their base, and adapters that bring their own chat template."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_serve.errors import AdapterError
from qlora_serve.merge.config import MergeSettings
from qlora_serve.merge.run import merge_adapter
from tests.tiny_models import tiny_tokenizer, write_random_adapter

ROWS = 520
KINDS = {
    "lora": {"target_modules": ["q_proj"]},
    "both-replaced": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding-lora": {"target_modules": ["q_proj", "embed_tokens"]},
}


def enlarged_adapter(folder: Path, base: Path, kind: str, **saving: object) -> PeftModel:
    """An adapter that PEFT saves after the embeddings were resized; gives the trained model."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(3)
    model.resize_token_embeddings(ROWS)
    with torch.no_grad():
        model.get_input_embeddings().weight[512:] = torch.randn(ROWS - 512, 64) * 0.3
        if not model.config.tie_word_embeddings:
            model.get_output_embeddings().weight[512:] = torch.randn(ROWS - 512, 64) * 0.3
    peft_model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **KINDS[kind]))
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    peft_model.save_pretrained(folder, **({"save_embedding_layers": True} | saving))
    return peft_model.eval()


def add_tokenizer(folder: Path, tokens: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder.parent / "tokenizer")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [f"<|new{index}|>" for index in range(tokens)]}
    )
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant\n<|new0|>")
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "lora"),
        ("llama-untied", "lora"),
        ("llama-untied", "both-replaced"),
        ("llama", "both-replaced"),
        ("llama", "embedding-lora"),
    ],
)
def test_enlarged_vocabulary(tiny, tmp_path, family, kind):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    trained = enlarged_adapter(tmp_path / "adapter", tiny(family), kind)
    size = len(AutoTokenizer.from_pretrained(tmp_path / "tokenizer"))
    add_tokenizer(tmp_path / "adapter", ROWS - size)
    tokens = torch.tensor([[1, 50, 511, 512, 519, 5]])
    with torch.no_grad():
        expected = trained(tokens).logits
    for streaming in ("off", "on"):
        output = tmp_path / streaming
        report = merge_adapter(
            MergeSettings(
                adapter=tmp_path / "adapter",
                output=output,
                base=str(tiny(family)),
                streaming=streaming,
            )
        )
        assert report.vocabulary == ROWS
        assert report.tokenizer_from == "adapter"
        merged = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
        assert merged.config.vocab_size == ROWS
        with torch.no_grad():
            torch.testing.assert_close(merged(tokens).logits, expected, atol=1e-4, rtol=0)
        tokenizer = AutoTokenizer.from_pretrained(output)
        assert tokenizer.convert_tokens_to_ids("<|new0|>") == size
        assert "<|new0|>" in tokenizer.chat_template
        assert merged.config.tie_word_embeddings == (family == "llama" and kind == "lora")


def test_rows_that_were_not_saved_are_missed(tiny, tmp_path):
    enlarged_adapter(tmp_path / "adapter", tiny("llama-untied"), "lora")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, file)
    settings = MergeSettings(
        adapter=tmp_path / "adapter", output=tmp_path / "out", base=str(tiny("llama-untied"))
    )
    with pytest.raises(AdapterError, match="no new rows for lm_head"):
        merge_adapter(settings)


def test_tokenizer_with_more_tokens_than_embeddings_is_refused(tiny, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    adapter = write_random_adapter(tmp_path / "adapter", tiny("llama"))
    add_tokenizer(adapter, ROWS)
    with pytest.raises(AdapterError, match="rows of its new tokens"):
        merge_adapter(MergeSettings(adapter=adapter, output=tmp_path / "out"))


def test_chat_template_beside_the_adapter_is_carried_over(tiny, tmp_path):
    adapter = write_random_adapter(tmp_path / "adapter", tiny("llama"))
    own = AutoTokenizer.from_pretrained(tiny("llama")).chat_template + "{# mine #}"
    (adapter / "chat_template.jinja").write_text(own)
    report = merge_adapter(MergeSettings(adapter=adapter, output=tmp_path / "out"))
    assert report.tokenizer_from == "base, with the adapter's chat template"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == own
