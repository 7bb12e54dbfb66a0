"""A Modelfile for Ollama: the file, the chat template in Go's template language, stop tokens."""

import json
from pathlib import Path
from typing import Any

from qlora_serve.base.tokenizer import render_chat, stop_token_ids
from qlora_serve.errors import BaseModelError

MODELFILE = "Modelfile"

_CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
_LLAMA3 = """{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>

{{ .Content }}<|eot_id|>{{ end }}<|start_header_id|>assistant<|end_header_id|>

"""
_GEMMA = """{{- range .Messages }}<start_of_turn>{{ if eq .Role "assistant" }}model{{ else }}{{ .Role }}{{ end }}
{{ .Content }}<end_of_turn>
{{ end }}<start_of_turn>model
"""  # noqa: E501


def write_modelfile(folder: Path, model: str, tokenizer: Any) -> None:
    """Writes a Modelfile beside a GGUF file.

    Jinja cannot be translated in general. The chat template is rendered on a few chats and compared
    with those that have a known form in Go; without one, Ollama's own guess from the GGUF's
    template is left to it, and a comment says so.

    Args:
        folder: of the GGUF file.
        model: the GGUF file's name.
        tokenizer: with its chat template.
    """
    lines = [f"FROM ./{model}", ""]
    template = go_template(tokenizer)
    if template is not None:
        lines += [f'TEMPLATE """{template}"""', ""]
    else:
        lines += ["# No TEMPLATE: the chat template is none of those known here. Ollama reads", ""]
        lines[-1:] = ["# tokenizer.chat_template from the GGUF; compare what it makes of it.", ""]
    system = default_system(tokenizer)
    if system:
        lines += [f'SYSTEM """{system}"""', ""]
    for token in sorted(stop_token_ids(tokenizer)):
        text = tokenizer.decode([token], skip_special_tokens=False)
        lines.append(f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}")
    (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def go_template(tokenizer: Any) -> str | None:
    """The chat template in Go, when it is one that is known; else None."""
    for template, turn, opening in (
        (_CHATML, "<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n"),
        (
            _LLAMA3,
            "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (_GEMMA, "<start_of_turn>{role}\n{content}<end_of_turn>\n", "<start_of_turn>model\n"),
    ):
        if all(_renders(tokenizer, chat, turn, opening, template is _GEMMA) for chat in _CHATS):
            return template
    return None


def default_system(tokenizer: Any) -> str | None:
    """The system message that the template adds to a chat without one."""
    try:
        text = render_chat(tokenizer, _CHATS[0], add_generation_prompt=True)
        own = render_chat(tokenizer, [_SYSTEM, *_CHATS[0]], add_generation_prompt=True)
    except BaseModelError:
        return None
    before, found, after = own.partition(_SYSTEM["content"])
    if not found or not text.startswith(before) or not text.endswith(after):
        return None
    return text[len(before) : len(text) - len(after)] or None


_SYSTEM = {"role": "system", "content": "Be brief."}
_USER = {"role": "user", "content": "What is 2 + 2?"}
_ANSWER = {"role": "assistant", "content": "It is 4."}
_CHATS = ([_USER], [_USER, _ANSWER, _USER])


def _renders(
    tokenizer: Any, chat: list[dict[str, str]], turn: str, opening: str, is_gemma: bool
) -> bool:
    """Whether a chat, with a system message where there may be one, is rendered in a known form."""
    messages = chat if is_gemma else [_SYSTEM, *chat]
    try:
        text = render_chat(tokenizer, messages, add_generation_prompt=True)
    except BaseModelError:
        return False
    bos = tokenizer.bos_token or ""
    roles = {"assistant": "model"} if is_gemma else {}
    expected = "".join(
        turn.format(role=roles.get(m["role"], m["role"]), content=m["content"]) for m in messages
    )
    # Ollama puts the beginning-of-text token there itself.
    return text.removeprefix(bos) == expected + opening or text == expected + opening
