"""What a server begins before it imports torch."""

import math
from pathlib import Path

from qlora_serve.base.identity import read_header, weight_files
from qlora_serve.base.source import PREPARED_NAMES, locate_base
from qlora_serve.errors import BaseModelError
from qlora_serve.serve.config import ServeSettings
from qlora_serve.serve.engine.large_pages import PagesAhead

_SPARE = 1.02  # what alignment takes
_MOST_OF_FREE = 0.5


def pages_ahead(settings: ServeSettings) -> PagesAhead | None:
    """Begins to make memory ready for the weights that a server will lay out anew on a CPU.

    None where that is not known to be wanted: other dtypes, quantized bases, GPUs, a base that is
    not there yet, little free memory.
    """
    is_float32 = settings.dtype in ("auto", "float32") and settings.quantization == "none"
    may_be_on_gpu = settings.device != "cpu" and Path("/dev/nvidiactl").exists()
    is_here = Path(settings.base).expanduser().is_dir() or settings.base in PREPARED_NAMES
    if not is_float32 or may_be_on_gpu or not is_here:
        return None
    try:
        source = locate_base(settings.base)
        if source.quantization != "none":
            return None
        headers = [read_header(file)[0] for file in weight_files(source)]
    except (BaseModelError, ValueError, OSError):
        return None  # loading says it
    numbers = sum(math.prod(entry["shape"]) for header in headers for entry in header.values())
    size = int(4 * numbers * _SPARE)
    import psutil

    if size > _MOST_OF_FREE * psutil.virtual_memory().available:
        return None
    return PagesAhead(size)
