"""Is `qlora-serve plan` right? Planned memory beside the peak that real runs reach on a CPU.

    python benchmarks/plan_memory.py --base smollm2

Each case trains (or serves) in a process of its own. Its peak is what resident memory rises to
above what it is after all imports; the kernel's own high-water mark is read, so that nothing is
missed between samples. Linux only.

The C library's heap is as it is by default. `--exact` runs the processes with
MALLOC_MMAP_THRESHOLD_ set, which gives each block back when it is freed, so that what is measured
is the tensors alone, without the gaps of the heap.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

TRAINING: dict[str, dict[str, Any]] = {
    "4 × 128": {"micro_batch": 4, "max_length": 128},
    "4 × 256": {"micro_batch": 4, "max_length": 256},
    "1 × 512": {"micro_batch": 1, "max_length": 512},
    "4 × 256, checkpointing": {
        "micro_batch": 4, "max_length": 256, "gradient_checkpointing": True,
    },
    "4 × 128, rank 64, accumulated": {
        "micro_batch": 4, "max_length": 128, "rank": 64, "accumulation": 2,
    },
    "8 × 128, q and v only": {
        "micro_batch": 8, "max_length": 128, "target_modules": ["q_proj", "v_proj"],
    },
    "4 × 128, nf4": {"micro_batch": 4, "max_length": 128, "quantization": "nf4"},
    "4 × 128, bfloat16": {"micro_batch": 4, "max_length": 128, "dtype": "bfloat16"},
}  # fmt: skip
SERVING: dict[str, dict[str, Any]] = {
    "serve 4 × 512": {"max_sequences": 4, "context": 512},
    "serve 8 × 1024": {"max_sequences": 8, "context": 1024},
}
_ANSWER = 16  # tokens that a served request generates
_STEPS = 2
_MMAP_THRESHOLD = 65536


def main() -> None:
    """Runs the cases, and prints them as a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--case", action="append", help="only this one; may be given again")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--exact", action="store_true", help="without the gaps of the heap")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_measure(json.loads(arguments.child))))
        return
    chosen = arguments.case or [*TRAINING, *SERVING]
    unknown = sorted(set(chosen) - TRAINING.keys() - SERVING.keys())
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join([*TRAINING, *SERVING])}")
    environment = {"MALLOC_MMAP_THRESHOLD_": str(_MMAP_THRESHOLD)} if arguments.exact else {}
    rows = []
    for name in chosen:
        rows.append(_case(name, arguments.base, environment))
        print(json.dumps(rows[-1]), file=sys.stderr)
    _print(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def _case(name: str, base: str, environment: dict[str, str]) -> dict[str, Any]:
    kind = "train" if name in TRAINING else "serve"
    settings = (TRAINING | SERVING)[name]
    child = _child({"kind": kind, "base": base, "settings": settings}, environment)
    planned = _child(
        {"kind": "plan", "of": kind, "base": base, "settings": settings, "told": child}, {}
    )
    return {"case": name, "measured": child["peak"], **planned}


def _child(task: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | environment
    )
    return json.loads(done.stdout.splitlines()[-1])


def _measure(task: dict[str, Any]) -> dict[str, Any]:
    return {"train": _train, "serve": _serve, "plan": _plan}[task["kind"]](task)


def _plan(task: dict[str, Any]) -> dict[str, Any]:
    from qlora_serve.train.plan.config import PlanSettings
    from qlora_serve.train.plan.estimate import Planner, plan

    told = task["told"]
    extra = {"trained_share": told["trained_share"]} if task["of"] == "train" else {"adapters": 0}
    found = plan(
        Planner(PlanSettings(base=task["base"], device="cpu", **extra, **task["settings"]))
    )
    parts = found.training if task["of"] == "train" else found.serving
    return {"planned": parts.total, "parts": parts.model_dump()}


class _Peak:
    """The rise of resident memory since it was made, after everything was imported."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is now
        self._start = self._status("VmRSS")

    @staticmethod
    def _status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

    def rise(self) -> int:
        """Bytes."""
        return self._status("VmHWM") - self._start


def _train(task: dict[str, Any]) -> dict[str, Any]:
    from qlora_serve.train import run
    from qlora_serve.train.config import TrainSettings

    _import_everything()
    settings = task["settings"]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "rows.jsonl")
        rows = settings["micro_batch"] * settings.get("accumulation", 1) * _STEPS
        chat = [
            {"role": "user", "content": "count to a thousand"},
            {"role": "assistant", "content": " ".join(map(str, range(1000)))},
        ]
        # Every row is longer than the limit, so that all batches are full.
        data.write_text("".join(json.dumps({"messages": chat}) + "\n" for _ in range(rows)))
        peak = _Peak()
        result = run.train(
            TrainSettings(
                base=task["base"], data=data, output=Path(folder, "out"), device="cpu",
                max_steps=_STEPS, **settings,
            ),
            lambda _: None,
        )  # fmt: skip
        counts = result.manifest.data
        share = counts["trained_tokens"] / (counts["tokens"] - counts["rows"])
        return {"peak": peak.rise(), "trained_share": min(1.0, share)}


def _serve(task: dict[str, Any]) -> dict[str, Any]:
    from fastapi.testclient import TestClient

    from qlora_serve.serve.api.app import create_app
    from qlora_serve.serve.config import ServeSettings
    from qlora_serve.serve.run import build_service

    _import_everything()
    settings = task["settings"]
    peak = _Peak()
    service = build_service(
        ServeSettings(base=task["base"], device="cpu", max_sequences=settings["max_sequences"])
    )
    with TestClient(create_app(service)) as client:
        _fill(client, service.base_name, settings)
        return {"peak": peak.rise()}


def _fill(client: Any, model: str, settings: dict[str, Any]) -> None:
    """As many requests at once as may run, each of the full length."""
    from concurrent.futures import ThreadPoolExecutor

    words = "one two " * settings["context"]

    def ask(number: int) -> Any:
        body = {"model": model, "max_tokens": _ANSWER, "temperature": 0}
        # The template's own tokens come on top; a first request says how many there are.
        text = " ".join(words.split()[:number])
        messages = [{"role": "user", "content": text}]
        answer = client.post("/v1/chat/completions", json=body | {"messages": messages})
        answer.raise_for_status()
        return answer.json()["usage"]["prompt_tokens"]

    around = ask(8) - 8
    length = settings["context"] - around - _ANSWER
    with ThreadPoolExecutor(settings["max_sequences"]) as pool:
        list(pool.map(ask, [length] * settings["max_sequences"]))


def _import_everything() -> None:
    """What a run imports late, so that it does not count as its memory."""
    import bitsandbytes
    import torch
    from peft import get_peft_model
    from transformers import Trainer
    from transformers.models.llama import modeling_llama

    _ = (bitsandbytes, get_peft_model, Trainer, modeling_llama)
    weight = torch.randn(64, 64, requires_grad=True)
    (torch.randn(8, 64) @ weight).sum().backward()  # starts thread pools and kernels
    torch.optim.AdamW([weight]).step()


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(title="planned and measured peak memory, MiB")
    table.add_column("case")
    for heading in ("planned", "measured", "planned / measured"):
        table.add_column(heading, justify="right")
    for row in rows:
        ratio = row["planned"] / row["measured"]
        colour = "green" if abs(ratio - 1) <= 0.15 else "red"
        cells = (f"{row[key] / 2**20:,.0f}" for key in ("planned", "measured"))
        table.add_row(row["case"], *cells, f"[{colour}]{ratio:.2f}[/]")
    Console().print(table)


if __name__ == "__main__":
    main()
