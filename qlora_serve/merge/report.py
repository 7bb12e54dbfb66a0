"""`merge_report.json`: what was merged, and the proof that it answers as the adapter does."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from qlora_serve.merge.proof import Comparison

REPORT_FILE = "merge_report.json"


class MergeReport(BaseModel):
    """The content of merge_report.json."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    format: int = 1
    """The version of this file's layout."""
    adapter: str
    """The adapter's directory."""
    adapter_identity: str
    """See `adapters.identity.content_identity`."""
    base: str
    """The unquantized base, as it was named."""
    base_fingerprint: str
    """See `base.identity.fingerprint`."""
    base_match: str
    """Are its weights those trained on: same, same values (another dtype), unknown, different."""
    base_match_reason: str
    """How that is known, or why not."""
    trained_on: str
    """What the base was quantized to in training: none, nf4 ..., or unknown."""
    dtype: str
    """What the weights are stored in."""
    streamed: bool
    """Whether it was merged tensor by tensor, or with the model in memory."""
    vocabulary: int
    """The rows of its embeddings."""
    tokenizer_from: str
    """Whose tokenizer and chat template it has: the base's, or the adapter's own."""
    proof_dtype: str
    """What both sides of the proof were computed in."""
    tolerance: float
    """The allowed difference, as a share of the logits' standard deviation."""
    fault: str | None
    """Why the proof failed, when it did and the merge was published by force."""
    changed_modules: dict[str, float]
    """Module → size of its change as a share of its own size (Frobenius norms)."""
    untied_embeddings: bool
    """Whether the base's tied embeddings became two matrices, since the adapter touches them."""
    stop_token_ids: list[int]
    """The tokens at which the merged model stops."""
    probes: int
    """How many prompts the proof ran."""
    probes_origin: str
    """Where they come from."""
    merged_against_adapter: Comparison
    """The proof: the written model against base and adapter."""
    base_against_adapter: Comparison
    """What the adapter does to the base, to compare the proof with."""
    merged_against_quantized: Comparison | None
    """What merging costs: the written model against the adapter on the quantized base."""
    merged_against_quantized_note: str
    """Why that was not measured; empty when it was."""
    quantized: str | None = None
    """The directory of the quantized copy, when one was asked for."""
    quantized_against_merged: Comparison | None = None
    """What quantizing costs: the quantized copy against the merged model."""
    gguf: dict[str, Comparison] = {}
    """GGUF file → its logits against the merged model's."""
    versions: dict[str, str]
    """The packages that made it."""


def write_report(folder: Path, report: MergeReport) -> None:
    """Writes merge_report.json into a model's directory."""
    text = report.model_dump_json(indent=2) + "\n"
    (folder / REPORT_FILE).write_text(text, encoding="utf-8")


def report_table(report: MergeReport) -> Any:
    """The proof as a rich table."""
    from rich.table import Table

    table = Table(title=f"proof on {report.probes} prompts ({report.probes_origin})")
    table.add_column("compared with base + adapter")
    for heading in ("largest logit difference", "mean KL", "top-1 equal", "answers equal"):
        table.add_column(heading, justify="right")
    table.add_row(f"merged, in {report.dtype}", *_cells(report.merged_against_adapter))
    table.add_row("base alone", *_cells(report.base_against_adapter), style="dim")
    if report.merged_against_quantized is not None:
        table.add_section()
        label = f"merged, against the adapter on the {report.trained_on} base"
        table.add_row(label, *_cells(report.merged_against_quantized))
    if report.quantized is not None and report.quantized_against_merged is not None:
        table.add_section()
        label = f"{Path(report.quantized).name}, against the merged model"
        table.add_row(label, *_cells(report.quantized_against_merged))
    if report.gguf:
        table.add_section()
        for file, comparison in report.gguf.items():
            table.add_row(f"{file}, against the merged model", *_cells(comparison))
    table.caption = (
        f"tolerance {report.tolerance:g}; differences in standard deviations of the logits"
    )
    return table


def _cells(comparison: Comparison) -> tuple[str, ...]:
    return (
        f"{comparison.relative_difference:.2g}",
        f"{comparison.mean_kl:.2g}",
        f"{comparison.top1_agreement:.1%}",
        f"{comparison.equal_answers} of {comparison.answers}",
    )
