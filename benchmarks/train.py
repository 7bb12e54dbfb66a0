"""Training beside TRL's SFTTrainer: the same rows and settings, in turns, each in its own process.

    python benchmarks/train.py --quick
    python benchmarks/train.py --trl-python /path/to/venv/bin/python --json train.json

TRL lives in an environment of its own, since it asks for other versions. See docs/benchmarks.md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
DATA = HERE.parent / "examples" / "data"
SETS = ("tickets", "tagging")
OWN, PEER = "qlora-serve", "trl"


@dataclass(frozen=True)
class Case:
    """A kind of run."""

    name: str
    packing: bool = False
    nf4: bool = False
    max_length: int = 512


@dataclass(frozen=True)
class Turn:
    """One run."""

    tokens_per_second: float
    """Real tokens: padding counts for nobody."""
    peak: int
    """Bytes."""
    loss: float
    """On held-out rows, after training."""
    seed: int


CASES = [Case("unpacked"), Case("packed", packing=True), Case("nf4", nf4=True)]
Results = dict[str, dict[str, list[Turn]]]
"""Case → system → one turn a round."""


def main() -> None:
    """Runs all turns, prints the table, and writes the JSON file."""
    options = _options()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        files = _write_rows(work, options.rows)
        results = earlier_rounds(options.json) if options.append else {}
        done = max((len(turns) for case in results.values() for turns in case.values()), default=0)
        cases = [case for case in CASES if case.name in options.cases]
        clock = Clock(console, options.rounds * len(cases) * 3)
        for number in range(done, done + options.rounds):
            for case in cases:
                # Who goes first changes from round to round.
                systems = [OWN, PEER][:: 1 if number % 2 == 0 else -1]
                turns = _round(options, work, files, case, systems, number, clock)
                for system, turn in turns.items():
                    results.setdefault(case.name, {}).setdefault(system, []).append(turn)
    print_report(console, results)
    if options.json:
        options.json.write_text(json.dumps(_as_json(options, results), indent=2) + "\n")


class Clock:
    """Says what is being done, for how long already, and about how long it will go on."""

    def __init__(self, console: Console, parts: int) -> None:
        self._console = console
        self._parts = parts
        self._done = 0
        self._begun = time.monotonic()

    def say(self, what: str) -> None:
        """Before each part."""
        passed = time.monotonic() - self._begun
        line = f"{what} ... ({self._done + 1} of {self._parts}, {passed / 60:.1f} min so far"
        # After each case has been seen once, the parts to come are like those that were.
        if self._done >= 3 * len(CASES):
            line += f", about {passed / self._done * (self._parts - self._done) / 60:.0f} to go"
        self._console.print(f"{line})", style="dim")
        self._done += 1


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="smollm2", help="a directory or prepared name")
    parser.add_argument("--trl-python", default=sys.executable, help="a python that has TRL")
    parser.add_argument("--rows", type=int, default=64, help="training rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seeds", type=int, help="rounds take so many seeds in turn (default: each its own)"
    )
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument(
        "--append", action="store_true", help="go on with the rounds that --json holds already"
    )
    parser.add_argument("--quick", action="store_true", help="16 rows, one round")
    options = parser.parse_args()
    if options.append and not options.json:
        parser.error("--append needs --json FILE")
    if options.quick:
        options.rows, options.rounds = 16, 1
    options.seeds = options.seeds or options.rounds
    from qlora_serve.base.source import locate_base

    options.base = str(locate_base(options.base).path)
    return options


def earlier_rounds(file: Path) -> Results:
    """The turns that an earlier call has measured; none if there is no such file yet."""
    if not file.exists():
        return {}
    cases = json.loads(file.read_text())["cases"]
    return {
        case: {
            system: [Turn(**turn) for turn in turns] for system, turns in found["systems"].items()
        }
        for case, found in cases.items()
    }


def _write_rows(folder: Path, count: int) -> dict[str, list[str]]:
    """As many rows of each example data set, and held-out ones of both."""
    files: dict[str, list[str]] = {"data": [], "heldout": []}
    for kind, limit in (("train", count // len(SETS)), ("heldout", 16)):
        for name in SETS:
            lines = (DATA / f"{name}.{kind}.jsonl").read_text().splitlines()[:limit]
            file = folder / f"{name}.{kind}.jsonl"
            file.write_text("\n".join(lines) + "\n")
            files["data" if kind == "train" else kind].append(str(file))
    return files


def _round(
    options: Any,
    work: Path,
    files: dict[str, list[str]],
    case: Case,
    systems: list[str],
    number: int,
    clock: "Clock",
) -> dict[str, Turn]:
    seed = number % options.seeds
    common = {
        "base": options.base,
        "packing": case.packing,
        "nf4": case.nf4,
        "max_length": case.max_length,
        "micro_batch": options.micro_batch,
        "epochs": options.epochs,
        "learning_rate": options.learning_rate,
        "seed": seed,
        **files,
    }
    outputs = {system: str(work / f"{case.name}-{system}-{number}") for system in systems}
    found = {}
    for system in systems:
        clock.say(f"round {number + 1}, {case.name}, seed {seed}: {system}")
        python = options.trl_python if system == PEER else sys.executable
        found[system] = _work(python, common | {"do": system, "output": outputs[system]})
    clock.say(f"round {number + 1}, {case.name}, seed {seed}: held-out rows")
    judged = _work(sys.executable, common | {"do": "evaluate", "adapters": list(outputs.values())})
    tokens = judged["tokens"] * options.epochs
    return {
        system: Turn(tokens / run["seconds"], int(run["peak"]), judged[outputs[system]], seed)
        for system, run in found.items()
    }


def _work(python: str, job: dict[str, Any]) -> dict[str, float]:
    environment = os.environ | {
        "PYTHONPATH": str(HERE.parent),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [python, str(HERE / "train_worker.py"), json.dumps(job)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        sys.exit(f"{job['do']} failed:\n{done.stderr[-3000:]}")
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def ratios(results: Results, case: str, figure: str) -> list[float]:
    """Ours over theirs, of each round."""
    pairs = zip(results[case][OWN], results[case][PEER], strict=True)
    return [getattr(one, figure) / getattr(other, figure) for one, other in pairs]


def print_report(console: Console, results: Results) -> None:
    """Prints both systems side by side, and the own cases against one another."""
    table = Table(title="Training side by side, in turns")
    for column in ("case", "system"):
        table.add_column(column)
    for column in ("tokens/s", "peak GB", "held-out loss"):
        table.add_column(column, justify="right")
    for case, systems in results.items():
        for system, turns in systems.items():
            table.add_row(
                case,
                system,
                f"{median(turn.tokens_per_second for turn in turns):.1f}",
                f"{median(turn.peak for turn in turns) / 1e9:.2f}",
                _spread([turn.loss for turn in turns], "{:.4f}"),
                style="bold" if system == OWN else None,
            )
        table.add_row(
            "",
            "ratio",
            _spread(ratios(results, case, "tokens_per_second")),
            _spread(ratios(results, case, "peak")),
            _spread(ratios(results, case, "loss")),
            style="cyan",
            end_section=True,
        )
    console.print(table)
    console.print(losses_by_seed(results))
    for case, reference in (("packed", "unpacked"), ("nf4", "unpacked")):
        if case in results and reference in results:
            pairs = list(zip(results[case][OWN], results[reference][OWN], strict=True))
            speeds = [a.tokens_per_second / b.tokens_per_second for a, b in pairs]
            saved = median(b.peak - a.peak for a, b in pairs) / 1e9
            console.print(
                f"own {case} against own {reference}: {_spread(speeds)} tokens/s, "
                f"{saved:+.2f} GB less"
            )


def losses_by_seed(results: Results) -> Table:
    """The mean held-out loss of each seed, ours beside theirs, and how far they are apart."""
    table = Table(title="Held-out loss by seed")
    for column in ("case", "seed", OWN, PEER, "ours less theirs"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for case, systems in results.items():
        seeds = sorted({turn.seed for turn in systems[OWN]})
        means = {
            system: [mean(turn.loss for turn in turns if turn.seed == seed) for seed in seeds]
            for system, turns in systems.items()
        }
        for row in zip(seeds, means[OWN], means[PEER], strict=True):
            table.add_row(case, str(row[0]), *_losses(row[1], row[2]))
        if len(seeds) > 1:
            # How far apart seeds are in one system is the noise to see the difference against.
            deviations = [f"{stdev(means[system]):.4f}" for system in (OWN, PEER)]
            table.add_row(case, "mean", *_losses(mean(means[OWN]), mean(means[PEER])), style="cyan")
            table.add_row(case, "deviation", *deviations, "", style="cyan")
        table.add_section()
    return table


def _losses(own: float, peer: float) -> tuple[str, str, str]:
    return f"{own:.4f}", f"{peer:.4f}", f"{own - peer:+.4f}"


def _spread(values: list[float], form: str = "{:.2f} ×") -> str:
    text = form.format(median(values))
    if len(values) == 1:
        return text
    return f"{text} ({min(values):.3f}–{max(values):.3f})"


def _as_json(options: Any, results: Results) -> dict[str, Any]:
    import torch

    cases = {
        case: {
            "systems": {
                system: [vars(turn) for turn in turns] for system, turns in systems.items()
            },
            "ratios": {
                figure: ratios(results, case, figure)
                for figure in ("tokens_per_second", "peak", "loss")
            },
        }
        for case, systems in results.items()
    }
    machine = {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    settings = {
        key: getattr(options, key)
        for key in ("rows", "rounds", "seeds", "micro_batch", "epochs", "learning_rate")
    }
    return {"machine": machine, "settings": settings, "cases": cases}


if __name__ == "__main__":
    main()
