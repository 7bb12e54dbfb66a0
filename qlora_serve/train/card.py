"""The model card of an adapter, in the form that PEFT and the hubs read."""

from typing import Any

from qlora_serve.adapters.manifest import Manifest


def model_card(name: str, manifest: Manifest, parameters: dict[str, Any] | None = None) -> str:
    """README.md of an adapter's directory.

    Args:
        name: of the adapter.
        manifest: of its run.
        parameters: `trainable` and `total`, where they are known.
    """
    from huggingface_hub import ModelCardData

    base = manifest.base.unquantized or manifest.base.name
    tags = [f"base_model:adapter:{base}", "lora", "transformers", "qlora-serve"]
    data = ModelCardData(
        base_model=base, library_name="peft", pipeline_tag="text-generation", tags=tags
    )
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(_lines(name, manifest, parameters)) + "\n"


def _lines(name: str, manifest: Manifest, parameters: dict[str, Any] | None) -> list[str]:
    recipe, metrics, data = manifest.recipe, manifest.metrics, manifest.data
    on = (
        ""
        if manifest.base.quantization == "none"
        else f", quantized to {manifest.base.quantization}"
    )
    lines = [
        f"# {name}",
        "",
        f"A LoRA adapter for `{manifest.base.name}`{on}, trained by qlora-serve.",
        "",
        "- **Model type:** LoRA adapter (PEFT)",
        f"- **Finetuned from model:** `{base_of(manifest)}`",
        f"- **Rank and alpha:** {recipe.get('rank')}, {recipe.get('alpha'):g}",
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
        f"qlora-serve serve {base_of(manifest)} --adapter {name}=PATH_OF_THIS_DIRECTORY",
        "```",
        "",
        "Any tool that reads PEFT directories can load it.",
        "",
        "## Training details",
        "",
        f"{data.get('rows', '?')} rows, {metrics['steps']} steps; the loss went from "
        f"{metrics['first_loss']:.3f} to {metrics['last_loss']:.3f}. `report.html` shows how, "
        "`recipe.yaml` makes the adapter again, and `qlora_serve.json` holds every setting.",
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


def base_of(manifest: Manifest) -> str:
    """The base that a reader should load."""
    return manifest.base.name
