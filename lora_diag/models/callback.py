"""What the callbacks of a Trainer have in common that also work in a loop of one's own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Self

from torch import nn
from transformers import Trainer, TrainerCallback


class TrainingCallback(TrainerCallback):
    """A callback that attaches to the model when training begins and closes its output when it
    ends.

    Attributes:
        log: Called with the numbers of a step by name, on the main process; None to log nothing.
    """

    log: Callable[[dict[str, float]], None] | None

    @abstractmethod
    def attach(self, model: nn.Module, step: int = 0) -> Self:
        """Find the weights of a model after ``step`` updates, and open the output; return the
        callback.
        """

    @abstractmethod
    def close(self, finished: bool = True) -> None:
        """Release the model, and end the output; with ``finished=False`` as that of an interrupted
        run.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(finished=error is None)

    def log_to(self, trainer: Any) -> Self:
        """Send summaries to a Trainer's log, which TensorBoard, W&B and others receive; return the
        callback.
        """
        # Not the method of a subclass: that of TRL's trainers adds the means of its own metrics and
        # resets them.
        self.log = partial(Trainer.log, trainer) if isinstance(trainer, Trainer) else trainer.log
        return self

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Attach to the model, as ``attach`` does."""
        self.attach(model, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the output, as ``close`` does."""
        self.close()
