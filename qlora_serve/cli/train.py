"""`qlora-serve train`."""

import typer

from qlora_serve.cli.options import flags_from
from qlora_serve.train.config import TrainSettings

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

_PANELS = {
    "Base": ["quantization", "double_quantization", "dtype", "device", "unquantized_base"],
    "Adapter": ["rank", "alpha", "use_rslora", "dropout", "target_modules"],
    "Training": [
        "epochs", "max_steps", "micro_batch", "accumulation", "max_length", "learning_rate",
        "schedule", "warmup_ratio", "weight_decay", "adam_beta2", "max_grad_norm",
        "gradient_checkpointing",
    ],
    "Run": ["save_steps", "keep_checkpoints", "seed"],
}  # fmt: skip


def train(settings: TrainSettings) -> None:
    """Train a LoRA adapter on chats, and write it as a checked adapter directory.

    Only the assistant's words count in the loss. Ctrl-C saves a checkpoint.

    Examples:

        qlora-serve train --base smollm2 --data chats.jsonl --output adapters/mine

        qlora-serve train --base smollm2 --data chats.jsonl --output mine --quantization nf4

        qlora-serve train --config recipe.yaml --output adapters/mine --epochs 3
    """
    from qlora_serve.progress import console
    from qlora_serve.train.run import train as run

    def report(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False)

    result = run(settings, report)
    typer.echo(result.path)


app.command()(
    flags_from(
        TrainSettings,
        panels={field: panel for panel, fields in _PANELS.items() for field in fields},
    )(train)
)
