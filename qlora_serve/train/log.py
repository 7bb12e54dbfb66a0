"""`training_log.json`: what happened in a run, step by step, for reports and comparisons."""

import json
import platform
import resource
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qlora_serve.adapters.manifest import package_versions

LOG_FILE = "training_log.json"


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    step: int
    """From 1."""
    loss: float
    """Per trained token."""
    learning_rate: float
    """The one that the step was taken with."""
    grad_norm: float
    """Before it was limited."""
    tokens: int
    """Tokens that went through the model, padding left out, in all processes."""
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """The loss on the held-out rows."""

    step: int
    """After which it was measured; 0 is before training."""
    loss: float
    """Per counted token."""


@dataclass(frozen=True)
class Sample:
    """An answer to one of the fixed prompts."""

    step: int
    """After which it was given; 0 is before training."""
    prompt: str
    answer: str


@dataclass
class TrainingLog:
    """The content of training_log.json."""

    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    peak_memory_bytes: int = 0
    """Of the main process; on a GPU, of what torch held there."""
    environment: dict[str, Any] = field(default_factory=dict)
    format: int = 1
    """The version of this file's layout."""

    @property
    def losses(self) -> list[float]:
        """Of each step, in order."""
        return [step.loss for step in self.steps]

    @property
    def best(self) -> Evaluation | None:
        """The evaluation with the lowest loss, the first of equals."""
        return min(self.evaluations, key=lambda item: item.loss, default=None)

    def write(self, folder: Path) -> None:
        """Writes training_log.json into a directory."""
        content = {"format": self.format} | {
            name: value for name, value in asdict(self).items() if name != "format"
        }
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (folder / LOG_FILE).write_text(text, encoding="utf-8")


def read_log(folder: Path) -> TrainingLog:
    """Reads the training_log.json of an adapter or a checkpoint.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is missing, or no log.
    """
    content = json.loads((folder / LOG_FILE).read_text(encoding="utf-8"))
    return TrainingLog(
        steps=[Step(**item) for item in content["steps"]],
        evaluations=[Evaluation(**item) for item in content["evaluations"]],
        samples=[Sample(**item) for item in content["samples"]],
        peak_memory_bytes=content["peak_memory_bytes"],
        environment=content["environment"],
        format=content["format"],
    )


def environment(device: Any, processes: int) -> dict[str, Any]:
    """The machine and the packages of a run."""
    import torch

    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "processes": processes,
        "versions": package_versions(),
    }


def peak_memory(device: Any) -> int:
    """The most memory that this process has held, in bytes."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
