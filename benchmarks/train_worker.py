"""One training run or one evaluation, in a process of its own, for `train.py`.

    python train_worker.py '{"do": "qlora-serve" | "trl" | "evaluate", ...}'

prints one line of JSON. Memory is the process's own peak while it trains, so that loading the base
does not count for anyone.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


def reset_peak() -> None:
    """Lets the kernel's peak of resident memory begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The peak of resident memory since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def own(job: dict[str, Any]) -> dict[str, float]:
    """A run of qlora-serve, through its own door."""
    from qlora_serve.train.config import TrainSettings
    from qlora_serve.train.run import train

    settings = TrainSettings(
        base=job["base"],
        data=job["data"],
        output=Path(job["output"]),
        quantization="nf4" if job["nf4"] else "none",
        packing=job["packing"],
        max_length=job["max_length"],
        rank=16,
        alpha=32,
        learning_rate=job["learning_rate"],
        schedule="linear",
        warmup_ratio=0,
        epochs=job["epochs"],
        micro_batch=job["micro_batch"],
        seed=job["seed"],
        device="cpu",
    )
    # Its last words before training are about the base; memory is counted from there.
    result = train(settings, lambda line: reset_peak() if line.startswith("base:") else None)
    return {"seconds": result.metrics["seconds"], "peak": peak_bytes()}


def tokenized(job: dict[str, Any], files: list[str]) -> list[Any]:
    """The rows of files, as qlora-serve trains on them."""
    from qlora_serve.base.source import locate_base
    from qlora_serve.base.tokenizer import load_tokenizer, stop_token_ids
    from qlora_serve.train.data import read_chats
    from qlora_serve.train.masks import tokenize_row

    tokenizer = load_tokenizer(locate_base(job["base"]))
    stops = stop_token_ids(tokenizer)
    chats = [chat for file in files for chat in read_chats(Path(file)).rows]
    return [tokenize_row(tokenizer, c.messages, job["max_length"], stops) for c in chats]


def ordered_rows(job: dict[str, Any]) -> list[Any]:
    """The training rows in the order in which qlora-serve takes them without packing."""
    from qlora_serve.train.batches import LengthGroupedSampler

    rows = tokenized(job, job["data"])
    lengths = [len(row.input_ids) for row in rows]
    return [rows[i] for i in LengthGroupedSampler(lengths, job["micro_batch"], job["seed"], False)]


def trl(job: dict[str, Any]) -> dict[str, float]:
    """TRL's SFTTrainer with the same rows, labels, order, first weights and settings."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, set_seed
    from trl import SFTTrainer

    model = peer_base(job)
    rows = [
        {
            "input_ids": row.input_ids,
            "labels": [
                token if trained else -100
                for token, trained in zip(row.input_ids, row.trained, strict=True)
            ],
        }
        for row in ordered_rows(job)
    ]
    set_seed(job["seed"])  # PEFT draws the adapter's first weights right after it in both runs
    trainer = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(job["base"]),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        args=peer_settings(job),
    )
    reset_peak()
    result = trainer.train()
    peak = peak_bytes()
    trainer.save_model(job["output"])
    return {"seconds": result.metrics["train_runtime"], "peak": peak}


def peer_base(job: dict[str, Any]) -> Any:
    """The base in float32, or quantized by transformers as qlora-serve quantizes it."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = None
    if job["nf4"]:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    return AutoModelForCausalLM.from_pretrained(
        job["base"], dtype=torch.float32, quantization_config=quantization
    )


def peer_settings(job: dict[str, Any]) -> Any:
    """The same settings in TRL's words."""
    from trl import SFTConfig

    return SFTConfig(
        output_dir=job["output"],
        per_device_train_batch_size=job["micro_batch"],
        num_train_epochs=job["epochs"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="linear",
        max_length=job["max_length"],
        packing=job["packing"],
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        seed=job["seed"],
    )


def evaluate(job: dict[str, Any]) -> dict[str, float]:
    """The mean loss of each adapter on held-out rows, and the tokens of the training rows.

    By transformers' own loss, a row at a time, on the base that was trained on, whoever trained
    the adapter.
    """
    import torch
    from peft import PeftModel

    from qlora_serve.base.load import load_base

    found = {"tokens": float(sum(len(row.input_ids) for row in tokenized(job, job["data"])))}
    rows = tokenized(job, job["heldout"])
    quantization = "nf4" if job["nf4"] else "none"
    model: Any = load_base(job["base"], quantization, "float32", "cpu").model
    for number, path in enumerate(job["adapters"]):
        if number == 0:
            model = PeftModel.from_pretrained(model, path, adapter_name="0").eval()
        else:
            model.load_adapter(path, str(number))
        model.set_adapter(str(number))
        total = count = 0.0
        for row in rows:
            ids = torch.tensor([row.input_ids])
            labels = torch.where(torch.tensor([row.trained]), ids, -100)
            with torch.no_grad():
                loss = model(input_ids=ids, labels=labels).loss
            total += float(loss) * row.trained_tokens
            count += row.trained_tokens
        found[path] = total / count
    return found


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    work = {"qlora-serve": own, "trl": trl, "evaluate": evaluate}[given["do"]]
    begun = time.perf_counter()
    answer = work(given)
    print(json.dumps(answer | {"wall": time.perf_counter() - begun}))
