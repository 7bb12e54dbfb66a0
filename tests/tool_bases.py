"""Tiny bases whose chat templates teach tool calls, in four families' formats."""

import json
from pathlib import Path

from tiny_models import write_tiny_model
from transformers import AutoTokenizer

_TURN = (
    "{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for call in m.tool_calls or [] %}CALL{% endfor %}{{ '<|im_end|>\n' }}"
)
_END = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

HERMES = (
    "{% if tools %}{{ '<|im_start|>system\nCall as <tool_call>{\"name\": ..., \"arguments\": ...}"
    "</tool_call>\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    + _TURN.replace(
        "CALL", "{{ '<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}"
    )
    + "{% endfor %}" + _END
)  # fmt: skip
LLAMA = (
    "{% if tools %}{{ '<|im_start|>system\nRespond in the format {\"name\": function name, "
    '"parameters": dictionary of argument name and its value}.\n\' }}'
    "{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}"
    + _TURN.replace(
        "CALL",
        "{{ '{\"name\": \"' + call.function.name + '\", \"parameters\": '"
        " + call.function.arguments | tojson + '}' }}",
    )
    + "{% endfor %}" + _END
)  # fmt: skip
MISTRAL = (
    "{% if tools %}{{ '[AVAILABLE_TOOLS]' + tools | tojson }}{% endif %}{% for m in messages %}"
    + _TURN.replace("CALL", "{{ '[TOOL_CALLS][' + call.function | tojson + ']' }}")
    + "{% endfor %}" + _END
)  # fmt: skip

MISTRAL_NAMED = (
    "{% if tools %}{{ '[AVAILABLE_TOOLS]' + tools | tojson }}{% endif %}{% for m in messages %}"
    + _TURN.replace(
        "CALL",
        "{{ '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments | tojson }}",
    )
    + "{% endfor %}" + _END
)  # fmt: skip

TEMPLATES = {
    "hermes": HERMES, "llama3": LLAMA, "mistral": MISTRAL, "mistral-named": MISTRAL_NAMED
}  # fmt: skip


def write_tool_base(folder: Path, family: str) -> Path:
    """A tiny base of a family; `<tool_call>` is an ordinary added token, the others are special."""
    write_tiny_model(folder)
    config = json.loads((folder / "config.json").read_text())
    # Rendered tools are long in a tiny vocabulary.
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATES[family]
    if family == "hermes":
        tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    else:
        markers = {
            "llama3": ["<|python_tag|>"], "mistral": ["[TOOL_CALLS]"],
            "mistral-named": ["[TOOL_CALLS]", "[ARGS]"],
        }[family]  # fmt: skip
        tokenizer.add_tokens(markers, special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder
