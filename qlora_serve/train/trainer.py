"""The training loop: transformers' Trainer with our loss, row order, checkpoints and reports."""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from qlora_serve.errors import OutputError, TrainError
from qlora_serve.files import published_directory
from qlora_serve.progress import progress
from qlora_serve.train.batches import LengthGroupedSampler
from qlora_serve.train.config import TrainSettings
from qlora_serve.train.dataset import TrainingDataset
from qlora_serve.train.fast_lora import fast_lora
from qlora_serve.train.interrupt import StopRequest, stop_on_signals
from qlora_serve.train.layout import Layout
from qlora_serve.train.schedule import rate_factor, warmup_steps


class TrainingStopped(KeyboardInterrupt):
    """Someone asked the run to stop, and a checkpoint of it was saved."""

    def __init__(self, checkpoint: Path, step: int) -> None:
        self.checkpoint = checkpoint
        self.step = step
        super().__init__()


@dataclass(frozen=True)
class TrainOutcome:
    """How a training loop ended."""

    losses: list[float]
    """Of each step, in order."""
    seconds: float


def train_model(model: Any, dataset: TrainingDataset, settings: TrainSettings) -> TrainOutcome:
    """Trains a PEFT model in place.

    Raises:
        OutputError: a checkpoint cannot be written.
        TrainError: the loss is not finite.
        TrainingStopped: someone asked to stop; at the second time, a plain KeyboardInterrupt.
    """
    try:
        with stop_on_signals() as stop, progress("training", _steps(dataset, settings)) as bar:
            trainer = LoraTrainer(model, training_arguments(settings, model), dataset, settings)
            watcher = _Watcher(bar.update, stop)
            trainer.add_callback(watcher)
            with fast_lora(model) if model.device.type == "cpu" else nullcontext():
                result = trainer.train()
            if stop.asked:
                raise TrainingStopped(trainer.checkpoint_now(), trainer.state.global_step)
    finally:
        _remove_if_empty(settings.checkpoints)
    return TrainOutcome(watcher.losses, float(result.metrics["train_runtime"]))


def _steps(dataset: TrainingDataset, settings: TrainSettings) -> int:
    """Optimizer steps of the whole run, as Trainer counts them."""
    if settings.max_steps:
        return settings.max_steps
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    batches = math.ceil(math.ceil(len(dataset) / settings.micro_batch) / processes)
    return math.ceil(settings.epochs * math.ceil(batches / settings.accumulation))


def training_arguments(settings: TrainSettings, model: Any) -> TrainingArguments:
    """Our settings in the words of transformers."""
    on_gpu = model.device.type == "cuda"
    dtype = model.get_base_model().dtype
    arguments = TrainingArguments(
        output_dir=str(settings.checkpoints),
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.accumulation,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        # On a GPU the float32 LoRA layers compute in the base's dtype.
        bf16=on_gpu and dtype == torch.bfloat16,
        fp16=on_gpu and dtype == torch.float16,
        use_cpu=not on_gpu,
        seed=settings.seed,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        logging_steps=1,
        logging_nan_inf_filter=False,
        log_level="error",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
    )
    # More GPUs take more processes: transformers' one-process way splits batches under our hook.
    _ = arguments.device
    arguments._n_gpu = min(arguments._n_gpu, 1)
    return arguments


class LoraTrainer(Trainer):
    """Trainer with logits at trained positions only, and checkpoints that appear whole."""

    # The loss is already divided by the trained tokens of the whole step.
    loss_is_scaled_for_ga = True
    lr_scheduler: Any

    def __init__(
        self, model: Any, arguments: Any, dataset: TrainingDataset, settings: TrainSettings
    ) -> None:
        self.layout = Layout(model, settings.packing)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=self.layout.collate,
        )
        self.settings = settings
        # Makes Trainer count the labels of all micro-batches of a step, whatever the model takes.
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Our schedule; transformers' own spend the first step at a rate of zero."""
        warmup = warmup_steps(self.settings.warmup_ratio, num_training_steps)
        kind = self.settings.schedule
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer,
                lambda step: rate_factor(step, num_training_steps, warmup, kind),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The gradients of a micro-batch, added up over its pieces."""
        total: Any = 0.0
        for piece in self.layout.pieces(inputs):
            with self.layout.over(piece):
                total = total + super().training_step(model, piece, num_items_in_batch)
        return total

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """The loss per trained token of the whole step, of which this micro-batch is a part."""
        assert not return_outputs
        assert num_items_in_batch is not None
        loss = self.layout.loss(model, inputs)
        # Gradients are averaged over processes, while the count is of all of them. Rows that are
        # tokenized one by one may all turn out to be cut before their answers.
        tokens = num_items_in_batch.clamp(min=1)
        loss = loss * self.accelerator.num_processes / tokens
        if not bool(torch.isfinite(loss)):
            step = self.state.global_step + 1
            raise TrainError(
                f"the loss is {loss.item()} at step {step} of {self.state.max_steps}, so training "
                "stopped; lower --learning-rate, or choose --dtype bfloat16 or float32"
            )
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        lengths = (train_dataset or self.train_dataset).lengths
        settings = self.settings
        return LengthGroupedSampler(
            lengths, settings.micro_batch, settings.seed, settings.group_by_length
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes a plain PEFT adapter directory."""
        save_adapter(self.model, Path(output_dir or self.args.output_dir))

    @property
    def _checkpoint_path(self) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    def checkpoint_now(self) -> Path:
        """The checkpoint of the step that was reached, saved if it is not there yet."""
        if not self._checkpoint_path.is_dir():
            self._save_checkpoint(self.model, None)
        return self._checkpoint_path

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        target = self._checkpoint_path
        with published_directory(target) as staging:
            self.save_model(str(staging))
            with _torch_write_errors(target):
                self._save_optimizer_and_scheduler(str(staging))
                self._save_scaler(str(staging))
                self._save_rng_state(str(staging))
            self.state.save_to_json(str(staging / "trainer_state.json"))
        for old in find_checkpoints(target.parent)[: -self.settings.keep_checkpoints]:
            shutil.rmtree(old)


@contextmanager
def _torch_write_errors(target: Path) -> Iterator[None]:
    """Recognizes a failed `torch.save`, which loses the system's reason."""
    try:
        yield
    except RuntimeError as error:
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise OutputError(
            f"cannot write {target}: the optimizer's state could not be written whole; the disk "
            "may be full"
        ) from error


def save_adapter(model: Any, folder: Path) -> None:
    """Writes a PEFT model's adapter: its config and its tensors."""
    # Left to itself, PEFT may ask a hub whether the base's vocabulary was enlarged; ours never is.
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    # PEFT's card is a form full of gaps.
    (folder / "README.md").unlink(missing_ok=True)


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a directory, the oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[11:]))


class _Watcher(TrainerCallback):
    """Reports each step, and ends the run when asked to."""

    def __init__(self, report: Callable[[float, str], None], stop: StopRequest) -> None:
        self._report = report
        self._stop = stop
        self.losses: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ends the run if someone asked for it."""
        if self._stop.asked:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Keeps and shows the loss of a step."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self._report(state.global_step, f"loss {logs['loss']:.4f}")


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
