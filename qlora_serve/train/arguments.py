"""Our settings in the words of transformers, accelerate and DeepSpeed."""

from typing import Any

from transformers import TrainingArguments

from qlora_serve.train.config import TrainSettings
from qlora_serve.train.fsdp import fsdp_arguments
from qlora_serve.train.optimizer import transformers_name
from qlora_serve.train.parallel import world_size
from qlora_serve.train.zero import deepspeed_config


def training_arguments(settings: TrainSettings, device: Any, dtype: str) -> TrainingArguments:
    """Our settings in the words of transformers; with several processes, this joins them.

    Args:
        settings: of the run.
        device: the torch device to train on.
        dtype: what the base computes in.
    """
    on_gpu = device.type == "cuda"
    lowered = on_gpu or (settings.method == "full")
    arguments = TrainingArguments(
        output_dir=str(settings.checkpoints),
        per_device_train_batch_size=settings.micro_batch,
        per_device_eval_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.accumulation,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        optim=transformers_name(settings, on_gpu),
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        # Float32 parameters that are trained compute in the base's dtype.
        bf16=lowered and dtype == "bfloat16",
        fp16=lowered and dtype == "float16",
        use_cpu=not on_gpu,
        ddp_backend=None if on_gpu or world_size() == 1 else "gloo",
        ddp_find_unused_parameters=False,
        deepspeed=deepspeed_config(settings) if settings.deepspeed else None,
        **(fsdp_arguments() if settings.fsdp else {}),
        seed=settings.seed,
        eval_strategy="steps" if settings.eval_every else "no",
        eval_steps=settings.eval_every,
        metric_for_best_model="loss",
        greater_is_better=False,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 500,
        restore_callback_states_from_checkpoint=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        log_level="error",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        use_liger_kernel=settings.liger,
        # Our loss takes the logits at the trained positions from the model itself.
        liger_kernel_config={"fused_linear_cross_entropy": False} if settings.liger else None,
    )
    # More GPUs take more processes: transformers' one-process way splits batches under our hook.
    device = arguments.device
    if settings.deepspeed:
        _join_deepspeed(device.type == "cuda")
    arguments._n_gpu = min(arguments._n_gpu, 1)
    return arguments


def _join_deepspeed(on_gpu: bool) -> None:
    """Tells DeepSpeed of the processes that torch has joined; else it splits weights for one."""
    import deepspeed

    if not on_gpu:
        # On a CPU it would compile an operator of its own for exchanges, for minutes; gloo's do.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        "nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False
    )
