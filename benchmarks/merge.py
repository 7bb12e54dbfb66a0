"""How fast a streamed merge is beside copying the files, and how much memory it takes.

    python benchmarks/merge.py                    a random base of 1.7 GB in bfloat16, 3 rounds
    python benchmarks/merge.py --quick            30 MB, to see that it runs
    python benchmarks/merge.py --layers 24 --shard 500MB --rank 64
    python benchmarks/merge.py --folder F         keeps the base in F; one that lies there is used

Copying and merging take turns, each in a process of its own. All read what the page cache holds
(the base has just been written, or is read once before), write to the same disk, and end when all
is flushed to it. Files are copied by `shutil.copyfile`, whose speed depends on how soon the kernel
finds free pages, and then past the page cache, as the merge writes: no way of copying is faster.
The merge is the writing of the weights alone, without the proof. Its memory is
the peak of the process while it merges, less what the process took right before: with all libraries
loaded and the adapter attached once. With `--compare` the first round's output is compared with
PEFT's `merge_and_unload` in float32, cast once.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Writes a base and an adapter, measures copying and merging, and prints both."""
    flags = _flags()
    if flags.quick:
        flags.layers, flags.hidden, flags.vocabulary, flags.shard = 2, 512, 4096, "10MB"
    if flags.worker:
        print(json.dumps(_WORKERS[flags.worker](Path(flags.folder), flags)))
        return
    folder = Path(flags.folder or tempfile.mkdtemp())
    try:
        if not (folder / "base").is_dir():
            _run("write_base", folder, sys.argv[1:])
        _run("write_adapter", folder, sys.argv[1:])
        for file in (folder / "base").glob("*.safetensors"):
            shutil.copyfile(file, os.devnull)  # into the page cache
        rounds = [
            {name: _measure(name, folder, sys.argv[1:]) for name in ("copy", "direct", "merge")}
            for _ in range(flags.repeat)
        ]
        _print(rounds, folder / "base")
        if flags.compare:
            _run("compare", folder, sys.argv[1:])
    finally:
        shutil.rmtree(folder / "out", ignore_errors=True)
        if flags.folder is None:
            shutil.rmtree(folder)


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--shard", default="200MB")
    parser.add_argument("--dtype", default="bfloat16", help="of base and output")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", default=None, help="on the disk to measure; it is kept")
    parser.add_argument("--compare", action="store_true", help="with PEFT's own merge")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def _write_base(folder: Path, flags: argparse.Namespace) -> dict[str, float]:
    """A random base."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=flags.vocabulary,
        hidden_size=flags.hidden,
        intermediate_size=flags.hidden * 4,
        num_hidden_layers=flags.layers,
        num_attention_heads=flags.hidden // 64,
        num_key_value_heads=flags.hidden // 128,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, flags.dtype))
    model.save_pretrained(folder / "base", max_shard_size=flags.shard)
    return {}


def _write_adapter(folder: Path, flags: argparse.Namespace) -> dict[str, float]:
    """A random adapter on all linear layers of the base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file

    from qlora_serve.base.skeleton import build_skeleton
    from qlora_serve.base.source import locate_base

    skeleton = build_skeleton(locate_base(str(folder / "base")))
    lora = LoraConfig(r=flags.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(skeleton, lora)
    torch.manual_seed(0)
    tensors = {
        name.replace(".default", ""): torch.randn(parameter.shape) * 0.02
        for name, parameter in peft_model.named_parameters()
        if "lora_" in name
    }
    peft_model.peft_config["default"].inference_mode = True
    peft_model.peft_config["default"].save_pretrained(folder / "adapter")
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    return {}


def _measure(name: str, folder: Path, flags: list[str]) -> dict[str, float]:
    shutil.rmtree(folder / "out", ignore_errors=True)
    os.sync()  # what others wrote is not to be waited for
    return _run(name, folder, flags)


def _run(name: str, folder: Path, flags: list[str]) -> dict[str, float]:
    call = [sys.executable, __file__, *flags, "--worker", name, "--folder", str(folder)]
    done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _copy(folder: Path, flags: argparse.Namespace) -> dict[str, float]:
    started = time.perf_counter()
    (folder / "out").mkdir()
    for file in (folder / "base").glob("*.safetensors"):
        shutil.copyfile(file, folder / "out" / file.name)
    _flush(folder / "out")
    return {"seconds": time.perf_counter() - started}


def _copy_direct(folder: Path, flags: argparse.Namespace) -> dict[str, float]:
    from qlora_serve.merge.direct_file import Buffer, DirectFile

    started = time.perf_counter()
    (folder / "out").mkdir()
    buffer = Buffer(8 * 2**20)
    for file in (folder / "base").glob("*.safetensors"):
        with file.open("rb", buffering=0) as source, DirectFile(folder / "out" / file.name) as out:
            while size := source.readinto(memoryview(buffer.place(0, 8 * 2**20).numpy())):
                out.write(buffer, size)
            out.finish()
    return {"seconds": time.perf_counter() - started}


def _merge(folder: Path, flags: argparse.Namespace) -> dict[str, float]:
    from qlora_serve.adapters.files import read_adapter
    from qlora_serve.base.skeleton import build_skeleton
    from qlora_serve.base.source import locate_base
    from qlora_serve.merge.bake import attach_adapter, empty_weights
    from qlora_serve.merge.stream import merge_streamed

    source, adapter = locate_base(str(folder / "base")), read_adapter(folder / "adapter")
    skeleton = build_skeleton(source)
    empty_weights(skeleton)
    attach_adapter(skeleton, adapter, weightless=True)
    (folder / "out").mkdir()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    started = time.perf_counter()
    out, shard = folder / "out", flags.shard
    merge_streamed(out, source, adapter, flags.dtype, shard, None, lambda done: None)
    _flush(out)
    return {"seconds": time.perf_counter() - started, "memory": _status("VmHWM") - before}


def _compare(folder: Path, flags: argparse.Namespace) -> dict[str, float]:
    """Every tensor of the output against PEFT's own merge in float32, cast once."""
    import torch
    from peft import PeftModel
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    expected = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload().state_dict()
    for file in (folder / "out").glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                tensor = tensors.get_tensor(name)
                if not tensor.equal(expected.pop(name).to(tensor.dtype)):
                    sys.exit(f"{name} differs from PEFT's")
    if expected:
        sys.exit(f"not written: {', '.join(expected)}")
    print("all tensors equal PEFT's merge, cast once, to the last bit", file=sys.stderr)
    return {}


_WORKERS = {
    "write_base": _write_base,
    "write_adapter": _write_adapter,
    "copy": _copy,
    "direct": _copy_direct,
    "merge": _merge,
    "compare": _compare,
}


def _flush(folder: Path) -> None:
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _status(name: str) -> float:
    """Bytes that Linux counts for this process; `ru_maxrss` would begin with its parent's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024.0


def _print(rounds: list[dict[str, dict[str, float]]], base: Path) -> None:
    sizes = [file.stat().st_size for file in base.glob("*.safetensors")]
    print(f"{sum(sizes) / 1e9:.2f} GB in {len(sizes)} files, the largest {max(sizes) / 1e6:.0f} MB")
    for number, found in enumerate(rounds, 1):
        seconds = [found[name]["seconds"] for name in ("copy", "direct", "merge")]
        print(
            "round {}: copying {:.2f} s, past the cache {:.2f} s, merging {:.2f} s".format(
                number, *seconds
            )
        )
    copied, direct, merged = (
        statistics.median(found[name]["seconds"] for found in rounds)
        for name in ("copy", "direct", "merge")
    )
    memory = max(found["merge"]["memory"] for found in rounds)
    print(
        f"medians: {copied:.2f} s, {direct:.2f} s and {merged:.2f} s; merging has "
        f"{copied / merged:.2f} of copying's speed, {direct / merged:.2f} of that past the cache"
    )
    print(f"memory: {memory / 1e6:.0f} MB, {memory / max(sizes):.2f} of the largest file")


if __name__ == "__main__":
    main()
