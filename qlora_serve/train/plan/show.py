"""A plan for people: tables, and a bar for what memory is made of."""

from typing import Any

from qlora_serve.train.plan.advice import GIB, CardFit
from qlora_serve.train.plan.memory import Plan

_BAR = 46
_COLOURS = {
    "weights": "blue", "adapter": "cyan", "gradients": "magenta", "optimizer": "yellow",
    "activations": "green", "communication": "red", "adapters": "cyan", "kv cache": "yellow",
    "step": "green", "heap": "bright_black",
}  # fmt: skip


def show(console: Any, plan: Plan, cards: list[CardFit]) -> None:
    """Prints a plan."""
    parameters = plan.parameters
    console.print(
        f"[bold]{plan.base}[/] ({plan.model_type}), {plan.quantization}, {plan.dtype}, planned for "
        f"{'a CPU' if plan.device == 'cpu' else 'a GPU'}"
    )
    console.print(
        f"[bold]{parameters.trainable:,}[/] trainable of {parameters.total:,} "
        f"({parameters.share:.4f} %)\n"
    )
    console.print(_components(plan))
    checkpointing = ", gradient checkpointing" if plan.gradient_checkpointing else ""
    _print_parts(
        console,
        f"Training, micro-batch {plan.micro_batch} × {plan.max_length} tokens{checkpointing}",
        plan.training.model_dump(),
    )
    if len(plan.stages) > 1:
        console.print(_stages(plan))
    serving = plan.serving
    _print_parts(
        console,
        f"Serving, {plan.max_sequences} requests × {plan.context} tokens",
        {
            "weights": serving.weights,
            "adapters": serving.adapters,
            "kv cache": serving.kv_cache,
            "step": serving.step,
        },
    )
    if plan.device != "cpu":
        console.print(_cards(cards))


def size(count: float) -> str:
    """Bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _components(plan: Plan) -> Any:
    from rich.table import Table

    table = Table(title="Parameters", title_justify="left", box=None, pad_edge=False)
    table.add_column("part")
    table.add_column("numbers", justify="right")
    table.add_column("share", justify="right")
    table.add_column("")
    counts = plan.parameters.by_component
    largest = max(counts.values())
    for name, count in counts.items():
        share = count / plan.parameters.total
        style = "cyan" if name == "adapter" else "blue"
        bar = "█" * max(1, round(24 * count / largest))
        table.add_row(name, f"{count:,}", f"{share:.2%}", f"[{style}]{bar}[/]")
    return table


def _print_parts(console: Any, title: str, parts: dict[str, int]) -> None:
    from rich.table import Table
    from rich.text import Text

    total = sum(parts.values())
    held = {name: count for name, count in parts.items() if count}
    console.print(f"\n[bold]{title}: {size(total)}[/]")
    bar = Text()
    for name, count in held.items():
        bar.append("█" * round(_BAR * count / total), style=_COLOURS[name])
    console.print(bar)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right", style="dim")
    for name, count in held.items():
        table.add_row(f"[{_COLOURS[name]}]█[/] {name}", size(count), f"{count / total:.0%}")
    console.print(table)


def _stages(plan: Plan) -> Any:
    from rich.table import Table

    processes = plan.stages[0].processes
    title = f"\nEach of {processes} processes, GiB"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    parts = [name for name in plan.training.model_dump() if name != "heap" or plan.training.heap]
    for column in ("stage", *parts, "total"):
        justify: Any = "left" if column == "stage" else "right"
        # Eighty columns are enough for the table only with a shorter word.
        header = column.replace("communication", "exchange")
        table.add_column(header, justify=justify, no_wrap=True)
    notes = [f"{stage.stage} {stage.note}" for stage in plan.stages if stage.note]
    table.caption = "\n".join(notes)
    table.caption_justify = "left"
    for stage in plan.stages:
        counts = stage.memory.model_dump()
        cells = [f"{counts[part] / GIB:.2f}" for part in parts]
        total = f"[bold]{stage.memory.total / GIB:.2f}[/]"
        table.add_row(stage.stage, *cells, total, style="dim" if stage.note else None)
    return table


def _cards(cards: list[CardFit]) -> Any:
    from rich.table import Table

    table = Table(title="\nWhat fits", title_justify="left", box=None, pad_edge=False)
    table.add_column("card")
    table.add_column("training")
    table.add_column("serving")
    for card in cards:
        if card.fits:
            training = "[green]fits as it is[/]"
        elif card.advised_total is not None:
            changes = ", ".join(card.advice)
            training = f"[yellow]with {changes}[/] ({size(card.advised_total)})"
        else:
            training = (
                f"[red]does not fit[/]: {size(card.smallest)} at the least; choose a smaller base, "
                "or split it with --deepspeed zero3"
            )
        if card.serving_fits:
            serving = f"[green]fits[/], room for {card.kv_tokens:,} tokens"
        elif card.kv_tokens:
            serving = f"[yellow]fewer or shorter requests[/]: room for {card.kv_tokens:,} tokens"
        else:
            serving = "[red]does not fit[/]"
        table.add_row(f"{card.card_gib} GB", training, serving)
    table.caption = (
        f"a card's memory less {GIB * 3 // 4 // 2**20} MiB for CUDA and 5 % for gaps, which are "
        "assumed and not measured"
    )
    table.caption_justify = "left"
    return table
