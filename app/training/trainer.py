"""transformers' Trainer with soft labels, a moving average, and a state from which it goes on to the same numbers."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dinat.app.training.augmentation import mix, targets
from dinat.app.training.recipe import Recipe

AVERAGE, PROGRESS = "average.safetensors", "progress.json"


@dataclass
class Epoch:
    """What an epoch came to. top1, top5, loss: on the validation, with the weights that would be kept."""

    epoch: int
    train_loss: float
    loss: float
    top1: float
    top5: float
    learning_rate: float
    seconds: float


@dataclass
class Progressed:
    """How far a training is; it is kept beside every checkpoint."""

    epochs: list[Epoch] = field(default_factory=list)
    best: int = -1
    """Which of them has the best accuracy, of equals the one of least loss."""

    @classmethod
    def read(cls, folder: Path) -> "Progressed":
        """What is kept in a checkpoint's folder."""
        values = json.loads((folder / PROGRESS).read_text())
        return cls([Epoch(**epoch) for epoch in values["epochs"]], values["best"])

    def add(self, epoch: Epoch) -> bool:
        """Whether it is the best so far."""
        self.epochs.append(epoch)
        is_best = self.best < 0 or (epoch.top1, -epoch.loss) > (self.epochs[self.best].top1, -self.epochs[self.best].loss)
        if is_best:
            self.best = len(self.epochs) - 1
        return is_best


class DinatTrainer(Trainer):
    """Trains by a recipe.

    keep: called with a network whose weights are to be kept: the best so far, or those of the last epoch.
    said: called with each epoch, once it is evaluated.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        recipe: Recipe,
        keep: Callable[[nn.Module], None],
        said: Callable[[Epoch], None],
        **data: Any,
    ) -> None:
        super().__init__(model, args, compute_metrics=accuracies, **data)
        self.network, self.recipe, self.keep, self.said = model, recipe, keep, said
        self.progress = Progressed()
        self.average = _averaged(model, recipe.ema) if recipe.ema else None
        self.began = time.monotonic()
        self.add_callback(_Steps(self))

    def go_on_from(self, folder: Path) -> None:
        """Take up what this class keeps in a checkpoint beside what Trainer keeps there."""
        self.progress = Progressed.read(folder)
        if self.average is not None:
            self.average.load_state_dict(load_file(folder / AVERAGE))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All but norms, biases, scales of layers, and positional biases."""
        return [name for name, value in model.named_parameters() if value.ndim > 1 and not name.endswith("rpb")]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross entropy: with what the recipe wants in training, with the labels in evaluation."""
        pixels, labels = inputs["pixel_values"], inputs["labels"]
        if not model.training:
            outputs = model(pixel_values=pixels)
            loss = F.cross_entropy(outputs.logits.float(), labels)
            return (loss, {"loss": loss, "logits": outputs.logits}) if return_outputs else loss
        classes = self.accelerator.unwrap_model(model).num_labels
        wanted = targets(labels, classes, self.recipe.label_smoothing)
        pixels, wanted = mix(pixels, wanted, self.recipe.mixup, self.recipe.cutmix)
        return F.cross_entropy(model(pixel_values=pixels).logits.float(), wanted)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """With the average's weights, where there is one."""
        if self.average is None:
            return self._evaluate(*args, **kwargs)
        own = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.network.load_state_dict(self.average.module.state_dict())
        try:
            return self._evaluate(*args, **kwargs)
        finally:
            self.network.load_state_dict(own)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        logged = next((entry for entry in reversed(self.state.log_history) if "learning_rate" in entry), {})
        epoch = Epoch(
            round(self.state.epoch or 0),
            logged.get("loss", float("nan")),
            metrics["eval_loss"],
            metrics["eval_top1"],
            metrics["eval_top5"],
            logged.get("learning_rate", 0.0),
            time.monotonic() - self.began,
        )
        is_best = self.progress.add(epoch)
        if self.is_world_process_zero():
            if is_best or self.recipe.keep == "last":
                self.keep(self.network)
            self.said(epoch)
        return metrics


def _averaged(network: nn.Module, decay: float) -> AveragedModel:
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]


class _Steps(TrainerCallback):
    """What happens between Trainer's steps."""

    def __init__(self, trainer: DinatTrainer) -> None:
        self._trainer = trainer

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Chance depends on the step alone: what is resumed draws what it would have drawn."""
        torch.manual_seed((args.seed * 1_000_003 + state.global_step) * 1024 + args.process_index)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The average takes its part of the new weights."""
        if self._trainer.average is not None:
            self._trainer.average.update_parameters(self._trainer.network)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop where the recipe's patience ends."""
        progress, patience = self._trainer.progress, self._trainer.recipe.patience
        if patience and len(progress.epochs) - 1 - progress.best >= patience:
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep the average and the progress; the last is written last, and says that the checkpoint is whole."""
        if not state.is_world_process_zero:
            return
        assert args.output_dir is not None
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._trainer.average is not None:
            save_file(
                {name: value.contiguous() for name, value in self._trainer.average.state_dict().items()}, folder / AVERAGE
            )
        temporary = folder / f"{PROGRESS}.part"
        temporary.write_text(json.dumps(asdict(self._trainer.progress)))
        os.replace(temporary, folder / PROGRESS)


class Bar(TrainerCallback):
    """A bar on a terminal that says how far it is."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """See TrainerCallback."""
        self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """See TrainerCallback."""
        self._bar.update(self._task, completed=state.global_step)


def accuracies(prediction: EvalPrediction) -> dict[str, float]:
    """top1 and top5."""
    logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    hits = best == labels[:, None]
    return {"top1": float(hits[:, 0].mean()), "top5": float(hits.any(axis=1).mean())}


def last_whole(folder: Path) -> Path | None:
    """The last checkpoint that was wholly written; later ones, which a kill cut off, are removed."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if (checkpoint / PROGRESS).exists():
            return checkpoint
        shutil.rmtree(checkpoint)
    return None
