"""Peers without a server: `generate` over one static batch, in this process.

They are spared HTTP, scheduling and streaming, and their requests all arrive at once with equal
lengths, which is the best that can happen to a static batch.
"""

import time
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from transformers import StoppingCriteria, StoppingCriteriaList
from workload import Case, Job, Measurement, adapter_names, as_chat

from qlora_serve.base.load import LoadedBase


class _Clock(StoppingCriteria):
    """Notes when each token of the batch was ready; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Transformers:
    """transformers' `generate`, base only."""

    name = "transformers"
    process: psutil.Process | None = None

    def __init__(self, base: LoadedBase) -> None:
        self._base = base
        if base.tokenizer.pad_token_id is None:
            base.tokenizer.pad_token = base.tokenizer.eos_token

    def supports(self, case: Case) -> bool:
        """Whether the case is one batch of the base."""
        return case.static and case.adapters == 0

    def run(self, clients: list[list[Job]]) -> Measurement:
        """Runs all clients' requests as one batch."""
        jobs = [job for own in clients for job in own]
        tokenizer = self._base.tokenizer
        clock = _Clock()
        start = time.perf_counter()
        texts = [as_chat(tokenizer, job.prompt) for job in jobs]
        inputs = tokenizer(
            texts,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        tokens = jobs[0].max_tokens
        with torch.inference_mode():
            self._generate(
                jobs,
                input_ids=inputs.input_ids.to(self._base.device),
                attention_mask=inputs.attention_mask.to(self._base.device),
                do_sample=False,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                stopping_criteria=StoppingCriteriaList([clock]),
                pad_token_id=tokenizer.pad_token_id,
            )
        gaps = [late - early for early, late in zip(clock.times, clock.times[1:], strict=False)]
        return Measurement(
            seconds=clock.times[-1] - start,
            tokens=len(clock.times) * len(jobs),
            ttfts=[clock.times[0] - start] * len(jobs),
            itls=gaps * len(jobs),
        )

    def _generate(self, jobs: list[Job], **arguments: Any) -> None:
        self._base.model.generate(**arguments)


class Peft(Transformers):
    """PEFT's `generate`: `set_adapter` where all rows share one, `adapter_names` where not."""

    name = "peft"

    def __init__(self, base: LoadedBase, adapters: Path, count: int) -> None:
        super().__init__(base)
        self._count = count
        first, *others = adapter_names(count)
        self._model = PeftModel.from_pretrained(base.model, adapters / first, adapter_name=first)
        for name in others:
            self._model.load_adapter(adapters / name, adapter_name=name)
        self._model.eval()

    def supports(self, case: Case) -> bool:
        """Whether the case is one batch of adapters that are loaded."""
        return case.static and 0 < case.adapters <= self._count

    def _generate(self, jobs: list[Job], **arguments: Any) -> None:
        names = [job.adapter for job in jobs]
        if len(set(names)) == 1:
            self._model.set_adapter(names[0])
        else:
            arguments["adapter_names"] = names
        self._model.generate(**arguments)
