"""`qlora-serve train`."""

import typer

from qlora_serve.cli.help import App
from qlora_serve.cli.options import flags_from
from qlora_serve.cli.output import libraries_on_stderr
from qlora_serve.train.config import TrainSettings

app = App()

_PANELS = {
    "Base": ["quantization", "double_quantization", "dtype", "device", "unquantized_base"],
    "Method": [
        "method", "rank", "alpha", "use_rslora", "use_dora", "init", "dropout", "bias",
        "target_modules", "layers_to_transform", "rank_pattern", "alpha_pattern",
        "modules_to_save", "trainable_tokens", "add_tokens", "loraplus_ratio",
    ],
    "Data": [
        "rows", "eval_data", "eval_split", "train_on", "max_length", "packing",
        "group_by_length", "tokenization",
    ],
    "Training": [
        "epochs", "max_steps", "micro_batch", "accumulation", "learning_rate",
        "schedule", "warmup_ratio", "optimizer", "weight_decay", "adam_beta1", "adam_beta2",
        "max_grad_norm", "gradient_checkpointing", "liger",
    ],
    "Evaluation": [
        "eval_every", "load_best", "early_stopping", "sample_prompt", "sample_rows",
        "sample_tokens",
    ],
    "Processes": ["processes", "deepspeed", "fsdp", "nodes", "node_rank", "rendezvous"],
    "Run": ["save_every", "keep", "resume", "track", "seed"],
}  # fmt: skip


def train(settings: TrainSettings) -> None:
    """Train a LoRA adapter on chats, and write it as a checked adapter directory.

    Only the assistant's words count in the loss. Ctrl-C saves a checkpoint, from which
    `--resume` goes on exactly.

    Examples:

        qlora-serve train --base smollm2 --data chats.jsonl --output adapters/mine

        qlora-serve train --base smollm2 --data chats.jsonl --output mine --quantization nf4

        qlora-serve train --base smollm2 --data chats.jsonl --output mine --resume

        qlora-serve train --base smollm2 --data chats.jsonl --output mine --processes 2

        qlora-serve train --config recipe.yaml --output adapters/mine --epochs 3
    """
    from qlora_serve.progress import console
    from qlora_serve.train.run import train as run

    def report(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False)

    with libraries_on_stderr():
        result = run(settings, report)
    typer.echo(result.path)


app.command()(
    flags_from(
        TrainSettings,
        panels={field: panel for panel, fields in _PANELS.items() for field in fields},
    )(train)
)
