"""An adapter's own tokenizer: used where it differs, refused where the model does not know it."""

from contextlib import closing

import pytest
from tiny_models import tiny_tokenizer
from transformers import AutoTokenizer

from qlora_serve.adapters.tokens import own_tokens
from qlora_serve.base.templates import TemplateProcess
from qlora_serve.errors import AdapterError

KNOWN = 512


@pytest.fixture
def base(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return AutoTokenizer.from_pretrained(tmp_path / "base")


def test_none_and_the_same_are_the_bases(base, tmp_path):
    assert own_tokens(tmp_path / "nothing", base, frozenset({2}), KNOWN) is None
    assert own_tokens(tmp_path / "base", base, frozenset({2}), KNOWN) is None


def test_added_tokens_and_another_end_of_turn_are_used(base, tmp_path):
    own = AutoTokenizer.from_pretrained(tmp_path / "base")
    own.add_special_tokens({"eos_token": "<|done|>"})
    own.chat_template = own.chat_template.replace("<|im_end|>", "<|done|>")
    own.save_pretrained(tmp_path / "own")
    new = own.convert_tokens_to_ids("<|done|>")
    with pytest.raises(AdapterError, match="start the server with --adapter-templates"):
        own_tokens(tmp_path / "own", base, frozenset({2}), new + 1)
    with closing(TemplateProcess()) as templates:
        found = own_tokens(tmp_path / "own", base, frozenset({2}), new + 1, templates)
        assert found is not None
        asked = [{"role": "user", "content": "x"}]
        text = found.tokenizer.apply_chat_template(asked, tokenize=False)
        assert found.template.render(asked) == text
    assert found.stop_token_ids == {2, new}
    chat = found.tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert found.tokenizer(chat)["input_ids"].count(new) == 1
    with pytest.raises(AdapterError, match=f"has a token {new}, and the model knows {new}"):
        own_tokens(tmp_path / "own", base, frozenset({2}), new)


def test_a_broken_one_is_refused(base, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "tokenizer.json").write_text("{")
    with pytest.raises(AdapterError, match=r"cannot be loaded: .*remove its files"):
        own_tokens(tmp_path / "own", base, frozenset({2}), KNOWN)


def test_a_chat_template_alone_is_the_bases_tokenizer_with_it(base, tmp_path):
    (tmp_path / "own").mkdir()
    file = tmp_path / "own" / "chat_template.jinja"
    file.write_text(base.chat_template)
    assert own_tokens(tmp_path / "own", base, frozenset({2}), KNOWN) is None
    file.write_text("{# mine #}" + base.chat_template.replace("<|im_end|>", "<|im_end|>!"))
    with pytest.raises(AdapterError, match="start the server with --adapter-templates"):
        own_tokens(tmp_path / "own", base, frozenset({2}), KNOWN)
    with closing(TemplateProcess()) as templates:
        found = own_tokens(tmp_path / "own", base, frozenset({2}), KNOWN, templates)
        assert found is not None
        assert "<|im_end|>!" in found.template.render([{"role": "assistant", "content": "x"}])
    assert found.tokenizer.get_vocab() == base.get_vocab()
    assert found.tokenizer.chat_template == file.read_text() != base.chat_template
