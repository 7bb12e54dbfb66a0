"""GGUF files of a model directory or an adapter, checked and with a Modelfile."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from qlora_serve.adapters.files import CONFIG_FILE, AdapterFiles, read_adapter
from qlora_serve.base.skeleton import build_skeleton
from qlora_serve.base.source import BaseSource, locate_base
from qlora_serve.base.tokenizer import load_tokenizer
from qlora_serve.errors import MergeError
from qlora_serve.files import published_directory, require_free_output
from qlora_serve.merge.combine import adapter_base
from qlora_serve.merge.config import ExportSettings, GgufType
from qlora_serve.merge.gguf.adapter import write_adapter
from qlora_serve.merge.gguf.check import check_model
from qlora_serve.merge.gguf.model import write_model
from qlora_serve.merge.gguf.modelfile import write_modelfile
from qlora_serve.merge.proof import Comparison, Probes, shipped_probes
from qlora_serve.merge.tensor_files import stored_tensors
from qlora_serve.progress import progress


class ExportReport(BaseModel):
    """What `export --json` prints."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    files: list[str]
    """The GGUF files."""
    checks: dict[str, Comparison]
    """File → its logits against the model's; none for an adapter."""


def export(settings: ExportSettings) -> ExportReport:
    """Writes the GGUF files of a model or an adapter into a new directory.

    Raises:
        MergeError: llama.cpp cannot hold it, or a file does not answer as the model does.
        OutputError: the output holds something.
    """
    require_free_output(settings.output)
    if (Path(settings.source) / CONFIG_FILE).is_file():
        adapter = read_adapter(Path(settings.source))
        return _export_adapter(settings, adapter, adapter_base(adapter, settings.base))
    if settings.base is not None:
        raise MergeError("--base is for adapters; a model needs none")
    source = locate_base(settings.source)
    if source.quantization != "none":
        raise MergeError(
            f"{settings.source} is quantized ({source.quantization}); export its unquantized "
            "original, and let GGUF quantize it"
        )
    with published_directory(settings.output) as staging:
        checks = write_gguf(staging, source, settings.gguf, source.display_name)
    return ExportReport(files=sorted(checks), checks=checks)


def write_gguf(
    folder: Path,
    source: BaseSource,
    kinds: tuple[GgufType, ...],
    title: str,
    probes: Probes | None = None,
) -> dict[str, Comparison]:
    """Writes a model's GGUF files and a Modelfile into a folder, and checks each.

    Args:
        folder: where to; may be the model's own.
        source: the model.
        kinds: one file for each.
        title: the model's name inside the files.
        probes: the prompts of the check; the shipped ones by default.

    Returns:
        file name → how it compares with the model.
    """
    tokenizer = load_tokenizer(source)
    probes = probes or shipped_probes(tokenizer)
    checks = {}
    for kind in kinds:
        name = f"model-{kind}.gguf"
        with progress(f"writing {name}", total=len(stored_tensors(source))) as bar:
            write_model(folder / name, source, kind, title, bar.update)
        checks[name] = check_model(folder / name, source, kind, probes)
    write_modelfile(folder, f"model-{kinds[0]}.gguf", tokenizer)
    return checks


def require_exportable(source: BaseSource, rows: int, tokenizer: object) -> None:
    """Checks, before any work, that llama.cpp knows the architecture and the tokenizer.

    Raises:
        MergeError: it does not.
    """
    from qlora_serve.merge.gguf.family import find_family
    from qlora_serve.merge.gguf.vocabulary import read_vocabulary

    find_family(build_skeleton(source).config)
    read_vocabulary(tokenizer, rows)


def _export_adapter(
    settings: ExportSettings, adapter: AdapterFiles, source: BaseSource
) -> ExportReport:
    names = []
    with published_directory(settings.output) as staging:
        for kind in settings.gguf:
            name = f"adapter-{kind}.gguf"
            with progress(f"writing {name}"):
                write_adapter(staging / name, adapter, source, kind)
            names.append(name)
    return ExportReport(files=names, checks={})
