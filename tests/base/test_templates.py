"""Adapters' chat templates: the same text as transformers', and no way to do harm."""

from collections.abc import Iterator

import pytest
from tiny_models import tiny_tokenizer
from tool_bases import TEMPLATES

from qlora_serve.base.templates import ChatTemplate, TemplateProcess
from qlora_serve.errors import BaseModelError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "你好 🙂 \u2028 \ud83d"[:-1]},
    {"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1.5}}}]},
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    process = TemplateProcess(seconds=1.0, memory=64 << 20, longest=10_000)
    yield process
    process.close()


@pytest.mark.parametrize("family", [*TEMPLATES, "tiny"])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_the_text_is_transformers_own(process, family, tools) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES.get(family, tokenizer.chat_template)
    chat = CHAT if family != "tiny" else CHAT[:2]
    for prompt in (True, False):
        expected = tokenizer.apply_chat_template(
            chat, tools=tools, tokenize=False, add_generation_prompt=prompt
        )
        assert ChatTemplate(tokenizer, process).render(chat, prompt, tools) == expected


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
         "did not end within 1 s"),
        ("{{ 9 ** (9 ** 9) }}", "did not end within 1 s"),
        ("{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
         "{% endfor %}{{ n.x }}", "more memory"),
        ("{{ 'x' * 10 ** 12 }}", "more memory"),
        ("{{ 'x'.ljust(10 ** 9) }}", "more memory"),
        ("{{ 'x' * 10001 }}", "it writes 10001 characters; 10000 are allowed"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "without an end"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% for %}", "chat template refuses"),
    ],
)  # fmt: skip
def test_a_template_that_takes_too_much_is_refused_and_the_next_one_served(
    process, template, said
) -> None:
    wanted = {"conversations": [[{"role": "user", "content": "hi"}]], "chat_template": template}
    with pytest.raises(BaseModelError, match=said):
        process.render(**wanted)
    assert process.render(**wanted | {"chat_template": "{{ messages[0].content }}"}) == "hi"
