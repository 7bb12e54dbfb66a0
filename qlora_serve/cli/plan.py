"""`qlora-serve plan`."""

import json

import typer

from qlora_serve.cli.help import App
from qlora_serve.cli.options import flags_from
from qlora_serve.cli.output import libraries_on_stderr
from qlora_serve.train.config import TrainSettings
from qlora_serve.train.plan.config import PlanSettings

app = App()


def plan(settings: PlanSettings) -> None:
    """Say what training and serving will need, before any weight is loaded.

    Takes every flag and key of `train`. Only config.json is read: parameters are counted on PEFT's
    own model without weights, and memory by running the model's own steps on tensors that hold
    nothing. Plans for a GPU, unless --device is cpu.

    Examples:

        qlora-serve plan --base smollm2 --rank 16 --max-length 512

        qlora-serve plan --base Qwen/Qwen2.5-7B-Instruct --quantization nf4 --processes 2

        qlora-serve plan --config recipe.yaml --json
    """
    from rich.console import Console

    from qlora_serve.progress import progress
    from qlora_serve.train.plan.advice import card_fits
    from qlora_serve.train.plan.estimate import Planner
    from qlora_serve.train.plan.estimate import plan as estimate
    from qlora_serve.train.plan.show import show

    with progress(f"planning {settings.base}"), libraries_on_stderr():
        planner = Planner(settings)
        found = estimate(planner)
        cards = card_fits(planner, found) if found.device != "cpu" else []
    if settings.as_json:
        content = found.model_dump(mode="json")
        content["parameters"]["share_percent"] = round(found.parameters.share, 4)
        content["training"]["total"] = found.training.total
        content["serving"]["total"] = found.serving.total
        for stage, said in zip(found.stages, content["stages"], strict=True):
            said["memory"]["total"] = stage.memory.total
        content["cards"] = [card.model_dump(mode="json") for card in cards]
        typer.echo(json.dumps(content, indent=2))
        return
    show(Console(highlight=False), found, cards)


app.command()(
    flags_from(
        PlanSettings, panels=dict.fromkeys(TrainSettings.model_fields, "The training recipe")
    )(plan)
)
