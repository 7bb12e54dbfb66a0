"""FSDP: weights, gradients and optimizer split over processes by torch, through accelerate."""

from pathlib import Path
from typing import Any

from qlora_serve.errors import ConfigError
from qlora_serve.train.config import TrainSettings
from qlora_serve.train.parallel import is_main


def check_fsdp(settings: TrainSettings, stored_quantization: str) -> None:
    """Refuses what FSDP cannot split.

    Raises:
        ConfigError: the base is quantized, or the adapter has to be converted when it is saved.
    """
    if not settings.fsdp:
        return
    stored = stored_quantization != "none"
    quantization = stored_quantization if stored else settings.quantization
    if quantization != "none":
        raise ConfigError(
            f"--fsdp splits the base's weights over processes, which packed {quantization} weights "
            "do not allow: each process would hold all of them; use --deepspeed zero2, or "
            "--quantization none"
        )
    if settings.init in ("pissa", "olora"):
        raise ConfigError(
            f"init: {settings.init} is converted with whole weights when it is saved, which --fsdp "
            "splits over processes; use --deepspeed zero2"
        )
    if settings.add_tokens:
        raise ConfigError(
            "add_tokens: the enlarged embeddings are saved whole, and --fsdp splits them over "
            "processes; use --deepspeed zero2"
        )


def fsdp_arguments() -> dict[str, Any]:
    """What transformers is told: FSDP2, a unit for each decoder layer."""
    return {
        "fsdp": True,
        "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"},
    }


def untie_originals(model: Any) -> None:
    """Gives modules that are trained whole an original of their own.

    PEFT keeps the frozen original beside the copy that is trained. Where embedding and output head
    are one weight, it would be part of two units of FSDP, which torch refuses.
    """
    import torch
    from peft.utils.other import ModulesToSaveWrapper

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            original: Any = module.original_module
            for name, weight in list(original.named_parameters(recurse=False)):
                copied = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
                setattr(original, name, copied)


def enable_on_cpu(trainer: Any) -> None:
    """Lets accelerate split a model over processes on CPUs.

    It takes its FSDP plugin for GPUs only, and would train plain copies without a word. torch's own
    FSDP2 does what it does on any device, gloo included.
    """
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = trainer.accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    state.distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


def save_optimizer(trainer: Any, folder: Path) -> None:
    """Writes optimizer and schedule, from the main process; all must call it.

    transformers' own way would write the adapter once more.
    """
    import torch
    from accelerate.utils import save_fsdp_optimizer
    from transformers.trainer import SCHEDULER_NAME

    accelerator = trainer.accelerator
    save_fsdp_optimizer(
        accelerator.state.fsdp_plugin, accelerator, trainer.optimizer, trainer.model, str(folder)
    )
    if is_main():
        torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
