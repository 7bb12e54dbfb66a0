"""The whole life of two adapters: train, serve beside their base, compare, merge.

    make demo
    .venv/bin/python examples/demo.py --questions 50

Every step is a command that can be typed by hand; it is printed before it runs. What an earlier
run left in demo/ is used again.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import scoring
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "demo"
QUESTIONS = 20  # held-out rows a task, of 50; `--questions 50` asks them all
SHOWN = 2  # rows a task in the table of answers
CONCURRENT = 12
MAX_TOKENS = 48
LONGEST_SHOWN = 110  # characters of a text in the table of answers
LISTENING = re.compile(r"listening on (http://\S+/v1)")

# Where the width is not known (a log), the side-by-side table needs more than 80 columns.
console = Console(width=None if sys.stdout.isatty() else 120)


@dataclass(frozen=True)
class Task:
    """One adapter: its recipe, its held-out rows and its measure."""

    name: str
    recipe: Path
    heldout: Path
    train: Path
    score: object


TASKS = (
    Task(
        "tagging",
        ROOT / "examples/recipes/tagging-lora.yaml",
        ROOT / "examples/data/tagging.heldout.jsonl",
        ROOT / "examples/data/tagging.train.jsonl",
        scoring.score_tagging,
    ),
    Task(
        "tickets",
        ROOT / "examples/recipes/tickets-qlora.yaml",
        ROOT / "examples/data/tickets.heldout.jsonl",
        ROOT / "examples/data/tickets.train.jsonl",
        scoring.score_tickets,
    ),
)
MERGED_TASK = TASKS[0]


def main(questions: int) -> None:
    """Runs the steps, asking `questions` held-out questions a task."""
    start = time.monotonic()
    step("1. the base: SmolLM2-135M-Instruct, unpacked once")
    qlora_serve("base", "prepare", "smollm2")
    step("2. two adapters: tagging by LoRA, tickets by QLoRA on the NF4 base")
    for task in TASKS:
        adapter = OUTPUT / "adapters" / task.name
        if adapter.exists():
            console.print(f"using {relative(adapter)} from an earlier run")
            continue
        # What a demo that was stopped half way has left; a run does not train over checkpoints.
        shutil.rmtree(adapter.with_name(f"{task.name}.checkpoints"), ignore_errors=True)
        qlora_serve("train", "--config", relative(task.recipe), "--output", relative(adapter))
    step("3. base and both adapters from one process, mixed in one batch")
    with server("smollm2", "--adapters-dir", relative(OUTPUT / "adapters")) as url:
        answers = ask_everyone(url, ["base", *(task.name for task in TASKS)], questions)
    show_answers(answers)
    show_scores(answers)
    step(f"4. {MERGED_TASK.name} baked into full weights, and proven")
    merged = OUTPUT / f"{MERGED_TASK.name}-merged"
    if merged.exists():
        console.print(f"using {relative(merged)} from an earlier run")
    else:
        adapter = OUTPUT / "adapters" / MERGED_TASK.name
        qlora_serve("merge", relative(adapter), "--output", relative(merged))
    with server(relative(merged)) as url:
        show_merged(url, answers[MERGED_TASK.name])
    step("done")
    console.print(f"The demo took {time.monotonic() - start:.0f} s. To keep a server running:\n")
    console.print("  .venv/bin/qlora-serve serve smollm2 --adapters-dir demo/adapters\n")
    console.print("and, in another terminal, talk to it:\n")
    console.print("  .venv/bin/qlora-serve chat --adapter tickets --temperature 0")


def step(title: str) -> None:
    """Prints a heading."""
    console.print()
    console.rule(f"[bold]{title}", align="left")


def relative(path: Path) -> str:
    """A path as one would type it in the checkout."""
    return str(path.relative_to(ROOT))


def qlora_serve(*arguments: str) -> None:
    """Prints a command and runs it; its failure ends the demo with its own message."""
    console.print(f"[dim]$ qlora-serve {' '.join(arguments)}", soft_wrap=True)
    command = [sys.executable, "-m", "qlora_serve.cli", *arguments]
    finished = subprocess.run(command, cwd=ROOT, check=False)
    if finished.returncode != 0:
        sys.exit(finished.returncode)


@contextmanager
def server(*arguments: str) -> Iterator[str]:
    """A server on a free port; gives the URL of its API."""
    console.print(f"[dim]$ qlora-serve serve {' '.join(arguments)}", soft_wrap=True)
    command = [sys.executable, "-m", "qlora_serve.cli", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            console.print(Text(line.rstrip()), soft_wrap=True)
            if found := LISTENING.search(line):
                yield found[1]
                return
        sys.exit(process.wait() or 1)
    finally:
        process.terminate()
        process.communicate()


def ask(client: openai.OpenAI, row: scoring.Row, who: str) -> str:
    """One answer, the most likely one."""
    answer = client.chat.completions.create(
        model=who,
        messages=row["messages"][:-1],
        temperature=0,
        max_tokens=MAX_TOKENS,
    )
    return answer.choices[0].message.content


Answers = dict[str, dict[str, list[str]]]


def ask_everyone(url: str, names: list[str], questions: int) -> Answers:
    """Every task's held-out questions to everyone at once: task → who → answers."""
    client = openai.OpenAI(base_url=url, api_key="none needed")
    rows = {task.name: scoring.read_rows(task.heldout)[:questions] for task in TASKS}
    # The names change fastest, so that neighbours in the batch have different adapters.
    wanted = [(task, number, who) for number in range(questions) for task in rows for who in names]
    answers: Answers = {task: {who: [""] * questions for who in names} for task in rows}
    with bar("asking", len(wanted)) as advance, ThreadPoolExecutor(CONCURRENT) as pool:

        def one(job: tuple[str, int, str]) -> None:
            task, number, who = job
            answers[task][who][number] = ask(client, rows[task][number], who)
            advance()

        list(pool.map(one, wanted))
    return answers


@contextmanager
def bar(title: str, total: int) -> Iterator[object]:
    """A progress bar; gives the function that moves it by one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)


def show_answers(answers: Answers) -> None:
    """The first questions of each task, side by side."""
    table = Table(title="The same held-out question to everyone", show_lines=True, expand=True)
    names = list(next(iter(answers.values())))
    for column in ("question", *names, "expected"):
        table.add_column(column, ratio=1, overflow="fold")
    for task in TASKS:
        for number, row in enumerate(scoring.read_rows(task.heldout)[:SHOWN]):
            question, expected = (message["content"] for message in row["messages"][-2:])
            said = [answers[task.name][name][number] for name in names]
            table.add_row(*(Text(shortened(text)) for text in (question, *said, expected)))
    console.print(table)


def shortened(text: str) -> str:
    """The beginning of an answer: the base likes to go on."""
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN].rstrip() + " ..."


def show_scores(answers: Answers) -> None:
    """How many answers keep the format, and how much of their content is right."""
    asked = len(answers[TASKS[0].name]["base"])
    table = Table(title=f"Scores on {asked} held-out questions a task")
    table.add_column("task")
    table.add_column("answered by")
    for column in ("well-formed", "content right", "chance"):
        table.add_column(column, justify="right")
    for task in TASKS:
        chance = scoring.chance_level(scoring.read_rows(task.train))
        for who, texts in answers[task.name].items():
            summary = summarise(task, texts)
            style = "bold green" if who == task.name else None
            table.add_row(
                task.name, who, f"{summary.well_formed:.0%}", f"{summary.content:.0%}",
                f"{chance:.0%}", style=style,
            )  # fmt: skip
        table.add_section()
    console.print(table)


def summarise(task: Task, texts: list[str]) -> scoring.Summary:
    """The score of one who answered."""
    rows = scoring.read_rows(task.heldout)[: len(texts)]
    expected = (row["messages"][-1]["content"] for row in rows)
    return scoring.summarise(
        [task.score(text, wanted) for text, wanted in zip(texts, expected, strict=True)]
    )


def show_merged(url: str, before: dict[str, list[str]]) -> None:
    """Asks the merged model what the adapter was asked, and counts equal answers."""
    client = openai.OpenAI(base_url=url, api_key="none needed")
    rows = scoring.read_rows(MERGED_TASK.heldout)[: len(before[MERGED_TASK.name])]
    with bar("asking the merged model", len(rows)) as advance:

        def one(row: scoring.Row) -> str:
            text = ask(client, row, "base")
            advance()
            return text

        with ThreadPoolExecutor(CONCURRENT) as pool:
            after = list(pool.map(one, rows))
    same = sum(a == b for a, b in zip(after, before[MERGED_TASK.name], strict=True))
    summary = summarise(MERGED_TASK, after)
    console.print(
        f"The merged model gives the adapter's own answer to {same} of {len(rows)} questions "
        f"(well-formed {summary.well_formed:.0%}, content right {summary.content:.0%})."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train, serve, compare and merge two adapters.")
    parser.add_argument(
        "--questions", type=int, default=QUESTIONS, choices=range(2, 51), metavar="N"
    )
    main(parser.parse_args().questions)
