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
        self.linear = library.linear_f32
        self.linear.restype = None
        self.linear.argtypes = [
            _POINTER, _INT, _INT, _POINTER, _POINTER, _POINTER, _INT, _POINTER, _INT,
        ]  # fmt: skip
        self.release_threads = library.release_threads
        self.release_threads.restype = None
        self.release_threads.argtypes = []
        self.compute_alone = library.compute_alone
        self.compute_alone.restype = None
        self.compute_alone.argtypes = []
        self.torch_alone = library.torch_alone
        self.torch_alone.restype = None
        self.torch_alone.argtypes = []
        self.team_size = library.team_size
        self.team_size.restype = _INT
        self.team_size.argtypes = []
        self.linear_panels = library.linear_panels
        self.linear_panels.restype = None
        self.linear_panels.argtypes = self.linear.argtypes
        self.linear_coded = library.linear_coded
        self.linear_coded.restype = None
        self.linear_coded.argtypes = [
            _POINTER, _POINTER, _INT, _INT, _INT, _POINTER, _POINTER, _POINTER, _POINTER, _INT,
            _INT, _POINTER, _POINTER, _INT, _POINTER, _INT,
        ]  # fmt: skip
        self.update = library.update_f32
        self.update.restype = None
        self.update.argtypes = [
            _POINTER, _INT, _POINTER, _INT, ctypes.POINTER(AdapterRows),
        ]  # fmt: skip
        self.to_panels = library.to_panels_f32
        self.to_panels.restype = None
        self.to_panels.argtypes = [_POINTER, _INT, _INT, _POINTER]
        self.lay_out_updates = library.lay_out_updates
        self.lay_out_updates.restype = None
        self.lay_out_updates.argtypes = [_POINTER, _INT]
        self.decode_panels = library.decode_panels
        self.decode_panels.restype = None
        self.decode_panels.argtypes = [
            _INT, _INT, _POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT, _POINTER, _INT,
        ]  # fmt: skip
        self.rms_norm = library.rms_norm_f32
        self.rms_norm.restype = None
        self.rms_norm.argtypes = [_POINTER, _INT, _INT, _POINTER, _FLOAT, _FLOAT, _POINTER]
        self.silu_product = library.silu_product_f32
        self.silu_product.restype = None
        self.silu_product.argtypes = [_POINTER, _POINTER, _INT, _POINTER]
        self.rotate = library.rotate_f32
        self.rotate.restype = None
        self.rotate.argtypes = [
            _POINTER, _INT, _INT, _INT, _INT, _INT, _POINTER, _POINTER, _POINTER,
        ]  # fmt: skip
        self.look_up = library.look_up_f32
        self.look_up.restype = _INT
        self.look_up.argtypes = [_POINTER, _INT, _POINTER, _INT, _INT, _FLOAT, _POINTER]
        self.largest = library.largest_f32
        self.largest.restype = None
        self.largest.argtypes = [_POINTER, _INT, _INT, _POINTER, _POINTER]
        self.replay = library.replay_calls
        self.replay.restype = None
        self.replay.argtypes = [_POINTER, _INT]
        self.attention = library.attention_f32
        self.attention.restype = None
        self.attention.argtypes = [
            _POINTER, _INT, _INT, _POINTER, _INT, _INT, _POINTER, _INT, _INT, _POINTER, _POINTER,
            _INT, _INT, _INT, _FLOAT, _INT, _FLOAT, _POINTER, _INT,
        ]  # fmt: skip


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
