"""The model card of an adapter, in the form that PEFT and the hubs read."""

from typing import Any

from qlora_serve.adapters.manifest import Manifest
from qlora_serve.wording import counted


def model_card(name: str, manifest: Manifest, parameters: dict[str, Any] | None = None) -> str:
    """README.md of an adapter's directory.

    Args:
        name: of the adapter.
        manifest: of its run.
        parameters: `trainable` and `total`, where they are known.
    """
    from huggingface_hub import ModelCardData

    base = manifest.base.unquantized or manifest.base.name
    whole = is_whole_model(manifest)
    relation = "finetune" if whole else "adapter"
    data = ModelCardData(
        base_model=base,
        library_name="transformers" if whole else "peft",
        pipeline_tag="text-generation",
        tags=[f"base_model:{relation}:{base}", *([] if whole else ["lora"]), "qlora-serve"],
    )
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(_lines(name, manifest, parameters)) + "\n"


def _lines(name: str, manifest: Manifest, parameters: dict[str, Any] | None) -> list[str]:
    metrics = manifest.metrics
    loss = metrics.get("eval_loss")
    rows = counted(manifest.data.get("rows", 0), "row", "rows")
    held_out = "" if loss is None else f", and is {loss:.3f} on held-out rows"
    on = (
        ""
        if manifest.base.quantization == "none"
        else f", quantized to {manifest.base.quantization}"
    )
    lines = [
        f"# {name}",
        "",
        *_kind_lines(manifest, on),
        f"- **Finetuned from model:** `{manifest.base.name}`",
    ]
    if parameters is not None:
        share = 100 * parameters["trainable"] / parameters["total"]
        lines.append(
            f"- **Trained parameters:** {parameters['trainable']:,} of "
            f"{parameters['total']:,} ({share:.4f} %)"
        )
    lines += [
        "",
        "## How to get started",
        "",
        "```",
        "qlora-serve serve PATH_OF_THIS_DIRECTORY"
        if is_whole_model(manifest)
        else f"qlora-serve serve {manifest.base.name} --adapter {name}=PATH_OF_THIS_DIRECTORY",
        "```",
        "",
        f"Any tool that reads {'transformers' if is_whole_model(manifest) else 'PEFT'} directories "
        "can load it.",
        "",
        "## Training details",
        "",
        f"{rows}, {counted(metrics['steps'], 'step', 'steps')}; the loss went from "
        f"{metrics['first_loss']:.3f} to {metrics['last_loss']:.3f}{held_out}. "
        "`report.html` shows how, `recipe.yaml` makes the adapter again, and `qlora_serve.json` "
        "holds every setting.",
        "",
        "## Limits",
        "",
        "It answers well on what its data were like, and was not checked for anything else; what "
        "the base gets wrong, it may get wrong too.",
        "",
        "### Framework versions",
        "",
        *(f"- {package} {version}" for package, version in manifest.versions.items()),
    ]
    return lines


def _kind_lines(manifest: Manifest, on: str) -> list[str]:
    recipe = manifest.recipe
    if is_whole_model(manifest):
        return [
            f"All weights of `{manifest.base.name}`, trained by qlora-serve.",
            "",
            "- **Model type:** causal language model",
        ]
    return [
        f"A LoRA adapter for `{manifest.base.name}`{on}, trained by qlora-serve.",
        "",
        "- **Model type:** LoRA adapter (PEFT)",
        f"- **Rank and alpha:** {recipe.get('rank')}, {recipe.get('alpha', 0):g}",
    ]


def is_whole_model(manifest: Manifest) -> bool:
    """Whether the run trained all weights, not an adapter."""
    return manifest.recipe.get("method") == "full"
