"""The training loop: transformers' Trainer with our loss, row order, checkpoints and reports."""

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from qlora_serve.base.memory import HeapLimit
from qlora_serve.errors import OutputError, TrainError
from qlora_serve.progress import progress
from qlora_serve.train import fsdp, save
from qlora_serve.train.batches import LengthGroupedSampler, own_batches
from qlora_serve.train.checkpoints import (
    RUN_FILE,
    STATE_FILE,
    newest_whole,
    published_together,
    remove_old,
    torch_write_errors,
)
from qlora_serve.train.config import TrainSettings
from qlora_serve.train.dataset import IGNORED, RowDataset, TrainingDataset
from qlora_serve.train.fast_lora import fast_lora
from qlora_serve.train.interrupt import stop_on_signals
from qlora_serve.train.layout import Layout
from qlora_serve.train.log import Evaluation, TrainingLog, peak_memory, read_log
from qlora_serve.train.optimizer import loraplus_optimizer
from qlora_serve.train.parallel import any_of, is_main, is_split, world_size
from qlora_serve.train.samples import Sampler
from qlora_serve.train.schedule import rate_factor, warmup_steps
from qlora_serve.train.watcher import Watcher

_BASE_DIVERGES = (
    "nothing is learnt yet, so that the base itself gives it: its weights are damaged, or products "
    "overflow (choose --dtype bfloat16 or float32)"
)

WriteExtra = Callable[[Path], None]


class TrainingStopped(KeyboardInterrupt):
    """Someone asked the run to stop, and a checkpoint of it was saved."""

    def __init__(self, checkpoint: Path, step: int) -> None:
        self.checkpoint = checkpoint
        self.step = step
        super().__init__()


@dataclass(frozen=True)
class TrainOutcome:
    """How a training loop ended."""

    log: TrainingLog
    tensors: dict[str, torch.Tensor]
    """See `save.trained_tensors`."""
    step: int
    """The step that is published: the last, or the best."""


@dataclass(frozen=True)
class Run:
    """All that a training loop works with."""

    model: Any
    settings: TrainSettings
    arguments: TrainingArguments
    dataset: TrainingDataset
    held_out: RowDataset | None
    identity: dict[str, Any]
    """See `checkpoints.run_identity`."""
    sampler: Sampler
    write_extra: WriteExtra
    """Writes what else belongs to a checkpoint, such as its manifest."""
    environment: dict[str, Any]
    resume_from: Path | None = None
    callbacks: tuple[TrainerCallback, ...] = ()


def train_model(run: Run) -> TrainOutcome:
    """Trains a model in place.

    Raises:
        OutputError: a checkpoint cannot be written.
        TrainError: the loss is not finite, or nothing is learnt.
        TrainingStopped: someone asked to stop; at the second time, a plain KeyboardInterrupt.
    """
    try:
        steps = _steps(run.dataset, run.settings)
        with (
            stop_on_signals(notice=is_main()) as stop,
            progress("training", steps, silent=not is_main()) as bar,
        ):
            trainer = OurTrainer(run)
            for callback in (Watcher(trainer, bar.update, stop), *run.callbacks):
                trainer.add_callback(callback)
            on_cpu = trainer.args.device.type == "cpu"
            # FSDP puts weights together for a layer's own forward pass only.
            with fast_lora(run.model) if on_cpu and not run.settings.fsdp else nullcontext():
                trainer.train(resume_from_checkpoint=_text(run.resume_from))
            trainer.log_.peak_memory_bytes = peak_memory(trainer.args.device)
            if any_of(stop.asked):
                raise TrainingStopped(trainer.checkpoint_now(), trainer.state.global_step)
            trainer.finish()
            return TrainOutcome(trainer.log_, *trainer.published_tensors())
    finally:
        if is_main():
            _remove_if_empty(run.settings.checkpoints)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _steps(dataset: TrainingDataset, settings: TrainSettings) -> int:
    """Optimizer steps of the whole run, as Trainer counts them."""
    if settings.max_steps:
        return settings.max_steps
    batches = math.ceil(math.ceil(len(dataset) / settings.micro_batch) / world_size())
    return math.ceil(settings.epochs * math.ceil(batches / settings.accumulation))


class OurTrainer(Trainer):
    """Trainer with logits at trained positions only, and checkpoints that appear whole."""

    # The loss is already divided by the trained tokens of the whole step.
    loss_is_scaled_for_ga = True
    lr_scheduler: Any
    optimizer: Any
    control: Any

    def __init__(self, run: Run) -> None:
        self.run = run
        self.settings = run.settings
        self.log_ = TrainingLog(environment=run.environment)
        self.step_tokens = 0
        # Who quantizes a base wants less memory, even at the cost of asking for pages again.
        lean = run.settings.quantization != "none" and run.model.device.type == "cpu"
        self.heap = HeapLimit() if lean else None
        self.layout = Layout(run.model, run.settings.packing, run.settings.fsdp, lean)
        if run.settings.fsdp:
            fsdp.untie_originals(run.model)
        super().__init__(
            model=run.model,
            args=run.arguments,
            train_dataset=run.dataset,
            eval_dataset=run.held_out,
            data_collator=self.layout.collate,
        )
        # Makes Trainer count the labels of all micro-batches of a step, whatever the model takes.
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)

    def create_accelerator_and_postprocess(self) -> None:
        """Called by Trainer while it is built."""
        super().create_accelerator_and_postprocess()
        if self.settings.fsdp and self.args.device.type == "cpu":
            fsdp.enable_on_cpu(self)

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

    def create_optimizer(self, model: Any = None) -> Any:
        """Trainer's, or LoRA+ with Trainer's class and options."""
        if self.optimizer is None and self.settings.loraplus_ratio is not None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            options["loraplus_weight_decay"] = self.settings.weight_decay
            self.optimizer = loraplus_optimizer(
                self.model, kind, options, self.settings.loraplus_ratio
            )
        optimizer = super().create_optimizer(model)
        # DeepSpeed flattens each group, which an empty one does not allow.
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

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
        if self.heap is not None:
            self.heap.after_step()
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
        self.step_tokens += _token_count(inputs)
        loss = self.layout.loss(model, inputs)
        # Gradients are averaged over processes, while the count is of all of them. Rows that are
        # tokenized one by one may all turn out to be cut before their answers.
        tokens = num_items_in_batch.clamp(min=1)
        loss = loss * self.accelerator.num_processes / tokens
        if not bool(torch.isfinite(loss)):
            # The weights after the last step gave it, so that a checkpoint of them is no good one.
            done = self.state.global_step
            self.diverged(f"the loss is {loss.item()}", None if done else _BASE_DIVERGES, done)
        return loss

    def diverged(
        self, reason: str, advice: str | None = None, good_before: int | None = None
    ) -> None:
        """Ends the run, and says what is left of it: checkpoints from before a step, if given.

        Raises:
            TrainError: always.
        """
        last = newest_whole(self.settings.checkpoints, good_before)
        left = f"; the last good checkpoint is {last}" if last else ""
        advice = advice or "lower --learning-rate, or choose --dtype bfloat16 or float32"
        step = self.state.global_step + 1
        raise TrainError(
            f"{reason} at step {step} of {self.state.max_steps}, so training stopped; "
            f"{advice}{left}"
        )

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The loss per counted token of the held-out rows, whatever their batches are."""
        was_training = self.model_wrapped.training
        self.model_wrapped.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # loss, tokens
        for rows, counts in own_batches(len(self.eval_dataset), self.settings.micro_batch):
            items = [self.eval_dataset[row] for row in rows]
            inputs = self._prepare_inputs(self.layout.collate(items))
            with self.compute_loss_context_manager(), self.layout.over(inputs):
                loss = self.layout.loss(self.model_wrapped, inputs)
            if counts:
                total[0] += float(loss)
                total[1] += int((inputs["labels"][:, 1:] != IGNORED).sum())
        total = self.accelerator.reduce(total, reduction="sum")
        self.model_wrapped.train(was_training)
        metrics = {"eval_loss": float(total[0] / total[1])}
        step = self.state.global_step
        self.log_.evaluations.append(Evaluation(step, metrics["eval_loss"]))
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def take_samples(self) -> None:
        """Answers the fixed prompts with the model as it is."""
        sampler = self.run.sampler
        shards = is_split(self.model)
        if sampler and (is_main() or shards):
            found = sampler.answers(self.model, self.state.global_step, shards)
            self.log_.samples.extend(found)

    def finish(self) -> None:
        """The last evaluation and the last samples."""
        step = self.state.global_step
        evaluations, samples = self.log_.evaluations, self.log_.samples
        if self.run.held_out is not None and not (evaluations and evaluations[-1].step == step):
            self.evaluate()
        if not (samples and samples[-1].step == step):
            self.take_samples()

    def published_tensors(self) -> tuple[dict[str, torch.Tensor], int]:
        """What is trained, and after which step: the best one if that was asked for."""
        best, step = self.log_.best, self.state.global_step
        if self.settings.load_best and best is not None and best.step not in (0, step):
            self._put_checkpoint(self.checkpoint_path(best.step))
            step = best.step
        tensors = save.trained_tensors(self.model)
        return tensors, step

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        settings = self.settings
        # Without padding there is nothing to save, and mixed batches train better than sorted ones.
        group = settings.group_by_length and self.layout.kind == "padded"
        self.row_order = LengthGroupedSampler(
            (train_dataset or self.train_dataset).lengths,
            settings.micro_batch,
            settings.seed,
            group,
        )
        return self.row_order

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.settings.checkpoints / f"checkpoint-{step}"

    def checkpoint_now(self) -> Path:
        """The checkpoint of the step that was reached, saved if it is not there yet."""
        path = self.checkpoint_path(self.state.global_step)
        if any_of(not path.is_dir()):
            self._save_checkpoint(self.model, None)
        return path

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        target = self.checkpoint_path(self.state.global_step)
        if any_of(target.is_dir()):
            return  # a run that was resumed passes its own last checkpoint only when it ends
        try:
            with published_together(target) as staging:
                self._write_checkpoint(staging, target)
        except OutputError as error:
            last = newest_whole(target.parent)
            if last is None:
                raise
            raise OutputError(
                f"{error}; the last good checkpoint is {last}: free some space, then run the same "
                "command with --resume"
            ) from error
        if is_main():
            best = self.log_.best
            remove_old(target.parent, self.settings.keep, best.step if best else None)

    def _write_checkpoint(self, staging: Path, target: Path) -> None:
        self.save_model(str(staging))
        with torch_write_errors(target):
            if self.settings.fsdp:
                fsdp.save_optimizer(self, staging)
            else:
                self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
        if not is_main():
            return
        self.state.save_to_json(str(staging / STATE_FILE))
        self.log_.write(staging)
        (staging / RUN_FILE).write_text(
            json.dumps(self.run.identity, indent=1) + "\n", encoding="utf-8"
        )
        self.run.write_extra(staging)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes a plain PEFT adapter directory, or a model's with `--method full`."""
        folder = Path(output_dir or self.args.output_dir)
        tensors = save.trained_tensors(self.model)
        if not save.is_adapter(self.model):
            save.save_model(self.model, folder, tensors, "float32")
            return
        save.save_adapter(self.model, folder, tensors)
        if save.is_converted(self.model) and is_main():
            from safetensors.torch import save_file

            save_file(tensors, folder / save.TRAINED_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._put_checkpoint(Path(resume_from_checkpoint))

    def _put_checkpoint(self, folder: Path) -> None:
        if save.is_adapter(self.model):
            save.load_adapter_tensors(self.model, folder)
        else:
            save.load_model_tensors(self.model, folder)

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        assert self.run.resume_from is not None
        earlier = read_log(self.run.resume_from)
        earlier.environment = self.run.environment
        self.log_ = earlier


def _token_count(inputs: dict[str, torch.Tensor]) -> int:
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        return int(mask.sum())
    return inputs["input_ids"].numel()


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
