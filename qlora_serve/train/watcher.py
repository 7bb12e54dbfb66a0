"""What looks at every step of a run: the log, the line on the terminal, and reasons to stop."""

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from qlora_serve.train.interrupt import StopRequest
from qlora_serve.train.log import Evaluation, Step, TrainingLog
from qlora_serve.train.parallel import any_of, world_size

if TYPE_CHECKING:
    from qlora_serve.train.trainer import OurTrainer


class Watcher(TrainerCallback):
    """Keeps the log, reports each step, and ends the run when asked to."""

    def __init__(
        self, trainer: "OurTrainer", report: Callable[[float, str], None], stop: StopRequest
    ) -> None:
        self._trainer = trainer
        self._report = report
        self._stop = stop
        self._since = time.monotonic()
        self._tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The samples before training."""
        if state.global_step == 0:
            self._trainer.take_samples()
        self._since = time.monotonic()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tells the row order its epoch: accelerate does not reach it through the loader that
        skips the batches of a run that is resumed."""
        self._trainer.row_order.set_epoch(math.floor((state.epoch or 0) + 1e-6))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ends the run if someone asked any of its processes to."""
        self._tokens, self._trainer.step_tokens = self._trainer.step_tokens, 0
        if any_of(self._stop.asked):
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Keeps and shows the loss of a step."""
        if not logs or "loss" not in logs:
            return
        now = time.monotonic()
        step = Step(
            step=state.global_step,
            loss=float(logs["loss"]),
            learning_rate=float(logs["learning_rate"]),
            grad_norm=float(logs.get("grad_norm") or 0.0),
            tokens=self._tokens * world_size(),
            seconds=round(now - self._since, 4),
        )
        self._since = now
        self._trainer.log_.steps.append(step)
        self._report(state.global_step, _line(step))
        self._check(step)

    def _check(self, step: Step) -> None:
        # With float16 the scaler skips steps whose gradients overflowed, and lowers itself.
        if self._trainer.args.fp16:
            return
        self._trainer.state.global_step -= 1  # the step that is over
        try:
            if not math.isfinite(step.grad_norm):
                self._trainer.diverged(f"the gradient's norm is {step.grad_norm}")
            if step.step == 1 and step.grad_norm == 0:
                self._trainer.diverged(
                    "every gradient is zero",
                    "nothing that is trained has a part in the answers: check --target-modules "
                    "and --layers-to-transform",
                )
        finally:
            self._trainer.state.global_step += 1

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any
    ) -> None:
        """Takes samples, keeps what may be published, and stops where nothing is gained."""
        self._trainer.take_samples()
        best = self._trainer.log_.best
        if self._trainer.settings.load_best and best and best.step == state.global_step:
            control.should_save = True
        patience = self._trainer.settings.early_stopping
        if patience and best and _evaluations_since(best, self._trainer.log_) >= patience:
            control.should_training_stop = True
        self._since = time.monotonic()


def _line(step: Step) -> str:
    speed = step.tokens / max(step.seconds, 1e-9)
    return f"loss {step.loss:.4f}  lr {step.learning_rate:.1e}  {speed:.0f} tokens/s"


def _evaluations_since(best: Evaluation, log: TrainingLog) -> int:
    return sum(item.step > best.step for item in log.evaluations)
