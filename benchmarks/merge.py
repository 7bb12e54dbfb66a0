"""How fast a streamed merge is beside copying the files, and how much memory it takes.

    python benchmarks/merge.py                    a random base of 1.1 GB in bfloat16
    python benchmarks/merge.py --quick            30 MB, to see that it runs
    python benchmarks/merge.py --layers 28 --hidden 3072 --shard 2GB

Each measurement is a process of its own, so that its peak memory is its own. Both write to the same
disk and flush what they wrote. The merge is the writing of the weights alone, without the proof.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Writes a base and an adapter, measures copying and merging, and prints both."""
    flags = _flags()
    if flags.worker:
        print(json.dumps(_WORKERS[flags.worker](Path(flags.folder), flags.shard)))
        return
    if flags.quick:
        flags.layers, flags.hidden, flags.vocabulary, flags.shard = 2, 512, 4096, "10MB"
    folder = Path(tempfile.mkdtemp(dir=flags.folder))
    try:
        _write_base(folder, flags)
        rows = {}
        for name in ("start", "copy", "merge"):
            best = min((_measure(name, folder, flags) for _ in range(flags.repeat)), key=_seconds)
            rows[name] = best
        _print(rows, _largest_shard(folder / "base"))
    finally:
        shutil.rmtree(folder)


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--shard", default="500MB")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", default=None, help="on the disk to measure")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def _write_base(folder: Path, flags: argparse.Namespace) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
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
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size=flags.shard)
    lora = LoraConfig(r=flags.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    peft_model.save_pretrained(folder / "adapter")


def _measure(name: str, folder: Path, flags: argparse.Namespace) -> dict[str, float]:
    shutil.rmtree(folder / "out", ignore_errors=True)
    call = [sys.executable, __file__, "--worker", name, "--folder", str(folder)]
    done = subprocess.run(
        [*call, "--shard", flags.shard], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _start(folder: Path, shard: str) -> dict[str, float]:
    """What the libraries alone take."""
    _prepare(folder)
    return {"seconds": 0.0, "memory": _peak()}


def _copy(folder: Path, shard: str) -> dict[str, float]:
    started = time.perf_counter()
    (folder / "out").mkdir()
    for file in (folder / "base").glob("*.safetensors"):
        shutil.copyfile(file, folder / "out" / file.name)
    _flush(folder / "out")
    return {"seconds": time.perf_counter() - started, "memory": _peak()}


def _merge(folder: Path, shard: str) -> dict[str, float]:
    from qlora_serve.merge.stream import merge_streamed

    source, adapter = _prepare(folder)
    (folder / "out").mkdir()
    started = time.perf_counter()
    merge_streamed(folder / "out", source, adapter, "bfloat16", shard, None, lambda done: None)
    _flush(folder / "out")
    return {"seconds": time.perf_counter() - started, "memory": _peak()}


_WORKERS = {"start": _start, "copy": _copy, "merge": _merge}


def _prepare(folder: Path) -> tuple[object, object]:
    import qlora_serve.merge.stream  # noqa: F401
    from qlora_serve.adapters.files import read_adapter
    from qlora_serve.base.source import locate_base

    return locate_base(str(folder / "base")), read_adapter(folder / "adapter")


def _flush(folder: Path) -> None:
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _seconds(row: dict[str, float]) -> float:
    return row["seconds"]


def _largest_shard(base: Path) -> int:
    return max(file.stat().st_size for file in base.glob("*.safetensors"))


def _print(rows: dict[str, dict[str, float]], shard: int) -> None:
    copied, merged = rows["copy"]["seconds"], rows["merge"]["seconds"]
    extra = rows["merge"]["memory"] - rows["start"]["memory"]
    print(f"copying            {copied:8.2f} s")
    print(f"streamed merge     {merged:8.2f} s   {copied / merged:.2f} of the speed of copying")
    print(f"largest shard      {shard / 1e6:8.0f} MB")
    print(f"memory of merging  {extra / 1e6:8.0f} MB   {extra / shard:.2f} of the largest shard")


if __name__ == "__main__":
    main()
