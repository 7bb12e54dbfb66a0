"""What merging costs an adapter that was trained on a quantized base."""

from importlib.util import find_spec
from typing import Any

from qlora_serve.adapters.files import AdapterFiles
from qlora_serve.adapters.manifest import Manifest
from qlora_serve.adapters.vocabulary import enlarge
from qlora_serve.base.load import Quantization, load_base
from qlora_serve.base.source import BaseSource, locate_base
from qlora_serve.errors import BaseModelError, QloraServeError
from qlora_serve.merge.bake import attach_adapter
from qlora_serve.merge.proof import Answers, Comparison, Probes, compare, follow
from qlora_serve.progress import progress

_QUANTIZED_ON_LOAD = ("nf4", "int8")


def cost_of_merging(
    adapter: AdapterFiles,
    base: BaseSource,
    probes: Probes,
    got: Answers,
    device: str,
    enlarged: int | None = None,
) -> tuple[Comparison | None, str]:
    """The merged model against the adapter on the quantized base, as it is served.

    An adapter partly learns to undo its base's quantization, which merging takes away from it.
    This is reported and decides nothing: the unquantized base is the right one to merge into.

    Args:
        adapter: the adapter.
        base: the unquantized base that it was merged into.
        probes: the prompts.
        got: what the merged model answered.
        device: where to compute.
        enlarged: the rows of the embeddings, when the adapter has more than the base.

    Returns:
        the comparison, or None and why there is none.
    """
    manifest = adapter.manifest
    if manifest is None or manifest.base.quantization == "none":
        return None, "the adapter is not recorded as trained on a quantized base"
    kind = manifest.base.quantization
    package = "bitsandbytes" if kind in _QUANTIZED_ON_LOAD else "gptqmodel"
    extra = "quant" if kind in _QUANTIZED_ON_LOAD else "gptq"
    if find_spec(package) is None:
        return None, f"{kind} needs {package}: pip install 'qlora-serve[{extra}]'"
    try:
        model = _quantized_model(manifest, base, device)
        if enlarged is not None:
            enlarge(model, adapter, enlarged)
        model = attach_adapter(model, adapter)
        with progress(f"asking the {kind} base", total=len(got.greedy)) as bar:
            quantized = follow(model, probes, got.greedy, bar.update)
    except (QloraServeError, RuntimeError, ValueError, ImportError) as error:
        # The merge itself is proven by now; a device without int8 kernels must not undo it.
        return None, f"could not be measured: {' '.join(str(error).split())[:200]}"
    return compare(quantized, got), ""


def _quantized_model(manifest: Manifest, base: BaseSource, device: str) -> Any:
    """The base with the rounding that the adapter was trained on."""
    trained_on = manifest.base
    stored = _stored_copy(trained_on.name, trained_on.quantization)
    kind: Quantization = "nf4" if trained_on.quantization == "nf4" else "int8"
    double = manifest.recipe.get("double_quantization", True) is True
    with progress(f"loading the base in {trained_on.quantization}"):
        if stored is not None:
            return load_base(stored, dtype="float32", device=device).model
        if trained_on.quantization not in _QUANTIZED_ON_LOAD:
            raise BaseModelError(
                f"the {trained_on.quantization} base {trained_on.name} is not here any more"
            )
        return load_base(str(base.path), kind, "float32", device, double).model


def _stored_copy(name: str, kind: str) -> str | None:
    """The quantized files that training read, where they still are."""
    try:
        return name if locate_base(name).quantization == kind else None
    except BaseModelError:
        return None
