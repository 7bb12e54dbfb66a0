"""Building and loading the C++ kernels."""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from qlora_serve.base.source import cache_folder

log = logging.getLogger(__name__)

_SOURCES = [
    Path(__file__).with_name(name)
    for name in (
        "coded.cpp", "linear.cpp", "attention.cpp", "elementwise.cpp", "layout.cpp", "replay.cpp",
        "team.cpp",
    )
]  # fmt: skip
_HEADERS = sorted(Path(__file__).parent.glob("*.h"))
# Floating point stays as written, but for fused multiply-add: -ffast-math would let NaN pass as a
# number, and on some systems changes how the whole process treats tiny numbers.
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC")
_SWITCH = "QLORA_SERVE_NATIVE"
"""0 uses torch's own operators everywhere, `always` the kernels even where they are slower."""

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_FORMS = {"p": _POINTER, "i": _INT, "f": _FLOAT}


class AdapterRows(ctypes.Structure):
    """The rows of one adapter and its update of a layer; see updates.h."""

    _fields_ = (
        ("first", _INT), ("last", _INT), ("rank", _INT), ("a", _POINTER), ("b", _POINTER),
        ("scale", _FLOAT),
    )  # fmt: skip


class SpanRows(ctypes.Structure):
    """The new tokens of one sequence; see attention.cpp."""

    _fields_ = (("first", _INT), ("count", _INT), ("start", _INT), ("table", _POINTER))


class Kernels:
    """The loaded functions. Every call releases Python's lock."""

    FLOATS = (_FLOAT,)
    """The types of arguments that are no whole numbers or pointers."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.linear = _function(library.linear_f32, "piipppipi")
        self.release_threads = _function(library.release_threads, "")
        self.compute_alone = _function(library.compute_alone, "")
        self.torch_alone = _function(library.torch_alone, "")
        self.team_size = _function(library.team_size, "", _INT)
        self.linear_panels = _function(library.linear_panels, "piipppipi")
        self.linear_coded = _function(library.linear_coded, "ppiiippppiippipi")
        self.update = _function(library.update_f32, "pipip")
        self.to_panels = _function(library.to_panels_f32, "piip")
        self.lay_out_updates = _function(library.lay_out_updates, "pi")
        self.decode_panels = _function(library.decode_panels, "iippppiipi")
        self.rms_norm = _function(library.rms_norm_f32, "piipffp")
        self.silu_product = _function(library.silu_product_f32, "ppip")
        self.rotate = _function(library.rotate_f32, "piiiiippp")
        self.look_up = _function(library.look_up_f32, "pipiifp", _INT)
        self.largest = _function(library.largest_f32, "piipp")
        self.replay = _function(library.replay_calls, "pi")
        self.attention = _function(library.attention_f32, "piipiipiippiiififpi")


def _function(found: Any, arguments: str, result: Any = None) -> Any:
    """A function of the library; its arguments are pointers, whole numbers and floats: p, i, f."""
    found.argtypes, found.restype = [_FORMS[form] for form in arguments], result
    return found


def are_forced() -> bool:
    """Whether the kernels are to be used without asking whether they are faster here."""
    return os.environ.get(_SWITCH) == "always"


@cache
def load_kernels() -> Kernels | None:
    """The kernels, built when this machine has not built them yet; None where that fails."""
    if os.environ.get(_SWITCH) == "0":
        return None
    try:
        return Kernels(ctypes.CDLL(str(_built())))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        log.warning("no native kernels, decoding is slower: %s", " ".join(said.split())[:300])
        return None


def _built() -> Path:
    """The shared library, from the cache folder or freshly compiled into it."""
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise OSError("there is no C++ compiler (g++)")
    openmp = _torch_openmp()
    content = [file.read_bytes() for file in (*_SOURCES, *_HEADERS)]
    content += [" ".join((compiler, *_FLAGS, openmp)).encode(), _processor()]
    name = hashlib.sha256(b"\0".join(content)).hexdigest()[:24]
    library = cache_folder() / "kernels" / f"{name}.so"
    if not library.is_file():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            fresh = Path(folder) / library.name
            compiled = [str(Path(folder) / f"{source.stem}.o") for source in _SOURCES]
            steps = [
                (compiler, *_FLAGS, "-c", str(source), "-o", to)
                for source, to in zip(_SOURCES, compiled, strict=True)
            ]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(_run_compiler, steps))
            _run_compiler((compiler, "-shared", *compiled, openmp, "-o", str(fresh)))
            fresh.replace(library)
    return library


def _run_compiler(step: tuple[str, ...]) -> None:
    subprocess.run(step, check=True, capture_output=True, text=True, timeout=300)


def _torch_openmp() -> str:
    """What to link for OpenMP: the very library that torch uses.

    With another one there would be two pools of threads, each of which keeps the cores busy while
    it waits for its next turn.
    """
    import torch

    folder = Path(torch.__file__).parent
    found = [*folder.glob("lib/libgomp*"), *folder.parent.glob("torch.libs/libgomp*")]
    return str(found[0]) if found else "-fopenmp"


def _processor() -> bytes:
    """What `-march=native` depends on: a cache folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor().encode()
    return "".join(sorted({x for x in lines if x.startswith(("flags", "Features"))})).encode()
