"""Answers to fixed prompts, so that one can read what training does."""

from typing import Any

import torch

from qlora_serve.base.tokenizer import encode_text, render_chat
from qlora_serve.train.log import Sample


class Sampler:
    """Answers the same prompts greedily, whenever it is asked."""

    def __init__(
        self, tokenizer: Any, stop_token_ids: list[int], prompts: tuple[str, ...], tokens: int
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
            chat = [{"role": "user", "content": prompt}]
            text = render_chat(self._tokenizer, chat, add_generation_prompt=True)
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
            found.append(Sample(step, prompt, answer))
        model.train(was_training)
        return found
