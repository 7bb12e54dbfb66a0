"""Chats, tokenizers and commands that the training tests share."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.tiny_models import tiny_tokenizer

CHATML_DEFAULT_SYSTEM = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe helpful<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TURNS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<|im_start|>' + role + '\n' + message['content'] | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
# Closes the whole chat with one more token, as Phi-3 does.
CLOSED = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% else %}{{ bos_token }}{% endif %}"
)
# The marker holds the answer but not the token that ends it.
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{{ '<|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The marker holds the end token and the line break after it.
MARKED_WIDE = MARKED.replace(
    "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}",
    "{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}",
)
# Drops what comes before </think> from all answers but the last.
FORGETFUL = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and not loop.last %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENDLESS = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def tokenizer_with(template: str) -> Any:
    """The tiny models' tokenizer under another chat template."""
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def chat(*turns: str) -> list[dict[str, str]]:
    """User and assistant in turn; a first turn that begins with `#` is the system's."""
    messages = []
    if turns[0].startswith("#"):
        messages.append({"role": "system", "content": turns[0][1:]})
        turns = turns[1:]
    for index, content in enumerate(turns):
        messages.append({"role": ("user", "assistant")[index % 2], "content": content})
    return messages


def write_chats(path: Path, chats: Sequence[Any]) -> Path:
    """Writes rows of messages as JSON Lines."""
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) for messages in chats]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


SOME_CHATS = [
    chat(
        "#Be brief", f"question {'lazy dog ' * (i % 5)}", f"answer {i % 3} world", "hello", "money"
    )
    for i in range(16)
]


def command(*arguments: object) -> list[str]:
    """A `qlora-serve` command line."""
    return [sys.executable, "-m", "qlora_serve.cli", *map(str, arguments)]


def quiet_environment() -> dict[str, str]:
    """An environment in which a subprocess keeps to one thread and a wide terminal."""
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "TERM": "xterm"}
