"""The work: prompts, random adapters, and the cases that are measured."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from qlora_serve.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from qlora_serve.base.tokenizer import render_chat
from qlora_serve.errors import QloraServeError
from qlora_serve.files import published_directory

RANK = 16
PROMPT_TOKENS = 129
OUTPUT_TOKENS = 64
WARM_UP_TOKENS = 8

# Frequent words, which are one token each in most vocabularies.
_TEXT = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line"
)
_WORDS = _TEXT.split()


class BenchmarkError(QloraServeError):
    """A measurement that cannot be made, or whose result would mean nothing."""


@dataclass(frozen=True)
class Job:
    """One request of one client."""

    prompt: str
    adapter: str | None
    """An adapter's name; None asks the base."""
    max_tokens: int
    delay: float = 0.0
    """Seconds to wait before it is sent, after the client's last answer."""


@dataclass(frozen=True)
class Measurement:
    """What one turn of one system gave."""

    seconds: float
    """From the first request to the last token."""
    tokens: int
    """Generated tokens of all requests."""
    ttfts: list[float]
    """Time to first token of each request, in seconds; an answer without any text has none."""
    itls: list[float]
    """Inter-token latencies of all requests, in seconds."""

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all clients together, over the turn."""
        return self.tokens / self.seconds


class Prompts:
    """Makes prompts of a given length, no two alike, so that no cached prefix shortens the work."""

    def __init__(self, tokenizer: Any, seed: str) -> None:
        self._tokenizer = tokenizer
        self._random = Random(seed)

    def make(self, tokens: int = PROMPT_TOKENS) -> str:
        """A user message that takes `tokens` tokens with the chat template, or just below."""
        words = self._random.choices(_WORDS, k=tokens)
        fitting = bisect_right(
            range(1, tokens + 1), tokens, key=lambda count: self._length(" ".join(words[:count]))
        )
        return " ".join(words[: max(1, fitting)])

    def _length(self, text: str) -> int:
        templated = as_chat(self._tokenizer, text)
        return len(self._tokenizer(templated, add_special_tokens=False).input_ids)


def as_chat(tokenizer: Any, prompt: str) -> str:
    """The prompt within the chat template, ready for the answer."""
    return render_chat(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)


Plan = Callable[["Case", Prompts], list[list[Job]]]
"""Makes the jobs of a turn: one list for each client, which sends them one after the other."""


def one_each(case: "Case", prompts: Prompts) -> list[list[Job]]:
    """One request a client, all at once, with the adapters round-robin."""
    names = adapter_names(case.adapters)
    return [
        [Job(prompts.make(), names[client % len(names)] if names else None, OUTPUT_TOKENS)]
        for client in range(case.clients)
    ]


@dataclass(frozen=True)
class Case:
    """One line of the results. A new one is an entry in `CASES`, with a plan where it needs one."""

    name: str
    meaning: str
    clients: int
    adapters: int = 0
    """How many adapters it needs; 0 asks the base."""
    versus: str | None = None
    """The case to compare with, in the same system."""
    plan: Plan = one_each
    static: bool = True
    """Whether one static batch does the same work, so that in-process peers can take part."""


CASES = (
    Case("base-1", "1 client, base", 1),
    Case("adapter-1", "1 client, 1 adapter", 1, adapters=1, versus="base-1"),
    Case("base-8", "8 clients, base", 8, versus="base-1"),
    Case("adapters-8", "8 clients, 8 adapters", 8, adapters=8, versus="base-8"),
    Case("adapters-32", "32 clients, 32 adapters", 32, adapters=32, versus="adapters-8"),
)
QUICK_CASES = ("base-1", "base-8", "adapters-8")


def require_known(names: Sequence[str], known: Sequence[str]) -> None:
    """Checks the names of cases.

    Raises:
        BenchmarkError: a name is unknown.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        raise BenchmarkError(
            f"no case is called {', '.join(unknown)}; the cases are: {', '.join(known)}"
        )


def adapter_names(count: int) -> list[str]:
    """The names under which every system knows the adapters."""
    return [f"adapter-{number}" for number in range(count)]


def adapter_number(name: str) -> int:
    """The place of a name in `adapter_names`."""
    return int(name.rpartition("-")[2])


def write_adapters(model: Any, folder: Path, count: int, rank: int = RANK) -> None:
    """Writes random adapters on all linear layers by PEFT; those that are there already stay.

    Args:
        model: the base, of which the shapes are used. It is given back as it was.
        folder: gets one directory an adapter, see `adapter_names`.
        count: how many there shall be.
        rank: of each adapter.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    missing = [name for name in adapter_names(count) if not (folder / name).is_dir()]
    if not missing:
        return
    settings = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    peft_model = get_peft_model(model, settings)
    weights = [weight for name, weight in peft_model.named_parameters() if "lora_" in name]
    for name in missing:
        generator = torch.Generator().manual_seed(adapter_number(name))
        with torch.no_grad():
            for weight in weights:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.01)
        with published_directory(folder / name) as unpublished:
            peft_model.save_pretrained(unpublished, save_embedding_layers=False)
    peft_model.unload()


def write_many_adapters(model: Any, folder: Path, count: int, rank: int) -> None:
    """Writes `count` random adapters at once, unless they are there already.

    PEFT writes the first one; the others have its config and tensors of its shapes, which takes
    milliseconds each.

    Args:
        model: the base, of which the shapes are used. It is given back as it was.
        folder: a new directory, which appears when all are written.
        count: how many.
        rank: of each adapter.
    """
    import torch
    from safetensors.torch import load_file, save_file

    if folder.is_dir():
        return
    with published_directory(folder) as unpublished:
        write_adapters(model, unpublished, 1, rank)
        first, *others = (unpublished / name for name in adapter_names(count))
        shapes = {name: value.shape for name, value in load_file(first / WEIGHTS_FILE).items()}
        config = (first / CONFIG_FILE).read_bytes()
        for number, path in enumerate(others, 1):
            generator = torch.Generator().manual_seed(number)
            path.mkdir()
            (path / CONFIG_FILE).write_bytes(config)
            tensors = {
                name: torch.randn(shape, generator=generator) * 0.01
                for name, shape in shapes.items()
            }
            save_file(tensors, path / WEIGHTS_FILE, metadata={"format": "pt"})
