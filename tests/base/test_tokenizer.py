"""Where an answer ends, and what a tokenizer must bring."""

from types import SimpleNamespace

import pytest

from qlora_serve.base.source import locate_base
from qlora_serve.base.tokenizer import end_of_turn_id, load_tokenizer, render_chat, stop_token_ids
from qlora_serve.errors import BaseModelError
from tests.tiny_models import write_tiny_model

PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
AFTER_SPACE = (
    "{% for m in messages %}{{ m['content'] + '\n' + '<|endoftext|>' + '\n' }}{% endfor %}"
)


@pytest.fixture
def tokenizer(tmp_path):
    return load_tokenizer(locate_base(str(write_tiny_model(tmp_path / "base"))))


@pytest.mark.parametrize(
    ("template", "expected"), [(None, "<|im_end|>"), (PLAIN, None), (AFTER_SPACE, "<|endoftext|>")]
)
def test_end_of_turn_is_what_the_template_writes(tokenizer, template, expected):
    if template is not None:
        tokenizer.chat_template = template
    found = end_of_turn_id(tokenizer)
    assert (tokenizer.decode([found]) if found is not None else None) == expected


@pytest.mark.parametrize(
    ("eos", "config_eos", "expected"),
    [
        ("<|im_end|>", None, {2}),
        ("<|endoftext|>", None, {0, 2}),
        ("<|endoftext|>", 1, {0, 1, 2}),
        (None, [0, 5], {0, 2, 5}),
    ],
)
def test_stop_tokens_are_a_union(tokenizer, eos, config_eos, expected):
    tokenizer.eos_token = eos
    config = SimpleNamespace(eos_token_id=config_eos)
    assert stop_token_ids(tokenizer, config, SimpleNamespace()) == expected


def test_template_that_refuses_the_messages(tokenizer):
    with pytest.raises(BaseModelError, match="unknown role judge"):
        render_chat(tokenizer, [{"role": "judge", "content": "x"}])


@pytest.mark.parametrize(
    ("missing", "words"),
    [("chat_template.jinja", "no chat template"), ("tokenizer.json", "tokenizer")],
)
def test_tokenizer_without_its_files(tmp_path, missing, words):
    base = write_tiny_model(tmp_path / "base")
    (base / missing).unlink()
    with pytest.raises(BaseModelError, match=words) as caught:
        load_tokenizer(locate_base(str(base)))
    assert "\n" not in str(caught.value)
