"""Chat templates in the manner of published families, written for these tests.

Each has what makes its family hard: default system messages, a begin token, merged system turns,
tool calls, end tokens, thoughts that are dropped as the chat goes on.
"""

import copy
from dataclasses import dataclass
from typing import Any

from tests.tiny_models import tiny_tokenizer


@dataclass(frozen=True)
class Family:
    """A family's template and the special tokens that it writes."""

    template: str
    tokens: tuple[str, ...]
    bos: str | None
    eos: str

    def tokenizer(self) -> Any:
        """The tiny tokenizer with this family's tokens."""
        tokenizer = copy.deepcopy(tiny_tokenizer())
        tokenizer.add_special_tokens({"additional_special_tokens": list(self.tokens)})
        tokenizer.bos_token, tokenizer.eos_token = self.bos, self.eos
        tokenizer.pad_token = self.eos
        tokenizer.chat_template = self.template
        return tokenizer


_QWEN_TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}"
    "{{- '# Tools\\n' }}{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- elif messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
    "{%- else %}{{- DEFAULT }}{%- endif %}"
)
_QWEN_CALLS = (
    "{%- for call in message.tool_calls or [] %}{%- set f = call.function %}"
    '{{- \'\\n<tool_call>\\n{"name": "\' + f.name + \'", "arguments": \' }}'
    "{{- f.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}"
)
_QWEN_RESULT = (
    "{%- elif message.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
    "{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}"
    "{%- endif %}{%- endif %}{%- endfor %}"
)
QWEN = Family(
    _QWEN_TOOLS.replace("DEFAULT", "'<|im_start|>system\\nYou are helpful.<|im_end|>\\n'")
    + "{%- for message in messages %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- elif message.role == 'assistant' %}"
    "{{- '<|im_start|>assistant' }}"
    "{%- if message.content %}{{- '\\n' + message.content }}{%- endif %}"
    + _QWEN_CALLS
    + _QWEN_RESULT
    + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}",
    ("<tool_call>", "</tool_call>"),
    None,
    "<|im_end|>",
)
# Shows the thoughts of answers after the last question only, and an empty thought there.
QWEN3 = Family(
    _QWEN_TOOLS.replace("DEFAULT", "''")
    + "{%- set ns = namespace(last=0) %}{%- for message in messages %}"
    "{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' %}"
    "{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- elif message.role == 'assistant' %}"
    "{%- set content = message.content %}{%- set thought = message.reasoning_content or '' %}"
    "{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    "{%- else %}{{- content }}{%- endif %}"
    + _QWEN_CALLS
    + _QWEN_RESULT
    + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}",
    ("<tool_call>", "</tool_call>", "<think>", "</think>"),
    None,
    "<|im_end|>",
)
LLAMA3 = Family(
    "{{- bos_token }}{%- for message in messages %}"
    "{%- if message.tool_calls %}"
    "{%- set f = message.tool_calls[0].function %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{{- '{\"name\": \"' + f.name + '\", \"parameters\": ' + (f.arguments | tojson) + '}' }}"
    "{{- '<|eot_id|>' }}"
    "{%- else %}{%- set role = 'ipython' if message.role == 'tool' else message.role %}"
    "{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}"
    "{{- (message.content | tojson if role == 'ipython' else message.content | trim) }}"
    "{{- '<|eot_id|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}",
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "<|begin_of_text|>",
    "<|eot_id|>",
)
SMOLLM2 = Family(
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are small.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    (),
    "<|endoftext|>",
    "<|im_end|>",
)
# The system message stands in the last question, wherever that is: earlier text changes.
MISTRAL = Family(
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}"
    "{%- set chat = messages[1:] %}{%- else %}{%- set chat = messages %}{%- endif %}"
    "{{- bos_token }}{%- for message in chat %}"
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate') }}{%- endif %}"
    "{%- if message.role == 'user' %}"
    "{%- if system is defined and loop.index0 >= chat | length - 2 %}"
    "{{- '[INST] ' + system + '\\n\\n' + message.content + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message.content + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + message.content + eos_token }}{%- endif %}{%- endfor %}",
    ("<s>", "</s>", "[INST]", "[/INST]"),
    "<s>",
    "</s>",
)
GEMMA = Family(
    "{{ bos_token }}{% set first = '' %}"
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\\n\\n' %}"
    "{% set chat = messages[1:] %}{% else %}{% set chat = messages %}{% endif %}"
    "{% for message in chat %}"
    "{% set role = 'model' if message.role == 'assistant' else message.role %}"
    "{{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') }}"
    "{{ message.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    "<bos>",
    "<eos>",
)
# Qwen's, with markers around what the assistant says.
QWEN_MARKED = Family(
    QWEN.template.replace(
        "{{- '<|im_start|>assistant' }}"
        "{%- if message.content %}{{- '\\n' + message.content }}{%- endif %}",
        "{{- '<|im_start|>assistant\\n' }}{% generation %}{{- message.content }}",
    ).replace(
        _QWEN_CALLS,
        _QWEN_CALLS.replace("<|im_end|>\\n", "<|im_end|>") + "{% endgeneration %}{{- '\\n' }}",
    ),
    QWEN.tokens,
    None,
    "<|im_end|>",
)

FAMILIES = {
    "qwen": QWEN,
    "qwen3": QWEN3,
    "llama3": LLAMA3,
    "smollm2": SMOLLM2,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "qwen-marked": QWEN_MARKED,
}
