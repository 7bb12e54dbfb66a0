"""Answers to fixed prompts, so that one can read what training does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_serve.base.tokenizer import encode_text, render_chat
from qlora_serve.train.data import ChatRow, Message
from qlora_serve.train.log import Sample


@dataclass(frozen=True)
class Question:
    """A chat that waits for an answer."""

    shown: str
    """What the log calls it: its last words."""
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


def ask(prompt: str) -> Question:
    """A question on its own."""
    return Question(prompt, [{"role": "user", "content": prompt}])


def question_of(row: ChatRow) -> Question:
    """A row of the data up to its last answer."""
    last = max(i for i, message in enumerate(row.messages) if message["role"] == "assistant")
    messages = row.messages[:last]
    shown = str(messages[-1]["content"]) if messages else ""
    return Question(shown, messages, row.tools)


class Sampler:
    """Answers the same prompts greedily, whenever it is asked."""

    def __init__(
        self, tokenizer: Any, stop_token_ids: list[int], prompts: Sequence[Question], tokens: int
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = stop_token_ids
        self._prompts = prompts
        self._tokens = tokens

    def __bool__(self) -> bool:
        return bool(self._prompts)

    @torch.no_grad()
    def answers(self, model: Any, step: int, shards: bool = False) -> list[Sample]:
        """The answers of a model as it is now. Draws no random numbers.

        Args:
            model: the model, not wrapped.
            step: how many steps are done.
            shards: whether processes hold a part of the weights each, and so must all call this.
        """
        was_training = model.training
        model.eval()
        found = []
        for prompt in self._prompts:
            text = render_chat(self._tokenizer, prompt.messages, True, prompt.tools)
            ids = torch.tensor([encode_text(self._tokenizer, text)], device=model.device)
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self._tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=self._stops,
                pad_token_id=self._stops[0],
                use_cache=True,
                synced_gpus=shards,
            )
            answer = self._tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            found.append(Sample(step, prompt.shown, answer))
        model.train(was_training)
        return found
