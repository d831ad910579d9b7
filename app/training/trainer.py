"""The Trainer of transformers with soft labels, an exponential moving average, and deterministic resumption."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from sklearn.metrics import f1_score
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dinat.app.training.augmentation import mix, soft_labels
from dinat.app.training.layers import depth_of_parameters
from dinat.app.training.recipe import Recipe
from dinat.model import DinatError

AVERAGE_FILE, HISTORY_FILE = "average.safetensors", "progress.json"


class DivergedError(DinatError):
    """A training whose validation loss is NaN or infinite."""


@dataclass
class Epoch:
    """Metrics of an epoch.

    Attributes:
        epoch: Number of the epoch, from 1.
        train_loss: Mean training loss.
        loss: Validation loss, with the weights that would be saved.
        top1: Validation top-1 accuracy, in 0..1.
        top5: Validation top-5 accuracy, in 0..1.
        learning_rate: Last learning rate.
        seconds: Duration of the epoch, evaluation included.
        macro_f1: Mean F1 of the validation classes, in 0..1.
    """

    epoch: int
    train_loss: float
    loss: float
    top1: float
    top5: float
    learning_rate: float
    seconds: float
    macro_f1: float = float("nan")


@dataclass
class History:
    """Metrics of all epochs so far. It is saved with each checkpoint.

    Attributes:
        epochs: Metrics of each epoch.
        best: Index of the epoch with the best top-1 accuracy, ties broken by the lowest loss; -1 before the first.
    """

    epochs: list[Epoch] = field(default_factory=list)
    best: int = -1

    @classmethod
    def read(cls, folder: Path) -> "History":
        """Read the history from a checkpoint's folder."""
        values = json.loads((folder / HISTORY_FILE).read_text())
        return cls([Epoch(**epoch) for epoch in values["epochs"]], values["best"])

    def add(self, epoch: Epoch) -> bool:
        """Add an epoch. Returns whether it is the best so far."""
        self.epochs.append(epoch)
        is_best = self.best < 0 or (epoch.top1, -epoch.loss) > (self.epochs[self.best].top1, -self.epochs[self.best].loss)
        if is_best:
            self.best = len(self.epochs) - 1
        return is_best

    def saved(self, keep: str) -> Epoch | None:
        """Return the epoch whose network is saved, by the recipe's `keep`; None before the first."""
        if not self.epochs:
            return None
        return self.epochs[self.best if keep == "best" else -1]


class DinatTrainer(Trainer):
    """Trains by a recipe. Raises DivergedError, before anything of that epoch is saved.

    Args:
        model: Network to train.
        args: Arguments of Trainer.
        recipe: Hyperparameters.
        save: Called with a network whose weights are to be saved: the best so far, or those of the last epoch.
        on_epoch: Called with each epoch after its evaluation.
        class_weights: Weight of each class in the training loss; None weighs all images equally.
        **data: Datasets and collator of Trainer.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        recipe: Recipe,
        save: Callable[[nn.Module], None],
        on_epoch: Callable[[Epoch], None],
        class_weights: Sequence[float] | None = None,
        **data: Any,
    ) -> None:
        super().__init__(model, args, compute_metrics=accuracies, **data)
        self.network, self.recipe, self.save, self.on_epoch = model, recipe, save, on_epoch
        self.history = History()
        self.average = _averaged(model, recipe.ema) if recipe.ema else None
        self.class_weights = None if class_weights is None else torch.tensor(class_weights)
        self.start = time.monotonic()
        self.add_callback(_StepCallback(self))

    def resume_from(self, folder: Path) -> None:
        """Load the state that this class saves in a checkpoint besides Trainer's own."""
        self.history = History.read(folder)
        if self.average is not None:
            self.average.load_state_dict(load_file(folder / AVERAGE_FILE))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the parameters with weight decay: all but norms, biases, layer scales and relative positional biases."""
        return [name for name, value in model.named_parameters() if value.ndim > 1 and not name.endswith("rpb")]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the cross entropy: with mixed soft labels in training, with hard labels in evaluation."""
        pixels, labels = inputs["pixel_values"], inputs["labels"]
        if not model.training:
            outputs = model(pixel_values=pixels)
            loss = F.cross_entropy(outputs.logits.float(), labels)
            return (loss, {"loss": loss, "logits": outputs.logits}) if return_outputs else loss
        num_classes = self.accelerator.unwrap_model(model).num_labels
        targets = soft_labels(labels, num_classes, self.recipe.label_smoothing)
        pixels, targets = mix(pixels, targets, self.recipe.mixup, self.recipe.cutmix)
        weights = None if self.class_weights is None else self.class_weights.to(targets.device)
        return F.cross_entropy(model(pixel_values=pixels).logits.float(), targets, weight=weights)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer, with a learning rate for each depth if the recipe decays it."""
        if self.recipe.layer_decay == 1 or self.optimizer is not None:
            return super().create_optimizer(*args, **kwargs)
        decayed, depths = set(self.get_decay_parameter_names(self.network)), depth_of_parameters(self.network)
        groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for name, value in self.network.named_parameters():
            if value.requires_grad:
                groups.setdefault((depths[name], name in decayed), []).append(value)
        optimizer, options = self.get_optimizer_cls_and_kwargs(self.args)
        rate = options.pop("lr")
        self.optimizer = optimizer(
            [
                {
                    "params": values,
                    "lr": rate * self.recipe.layer_decay**depth,
                    "weight_decay": self.args.weight_decay if is_decayed else 0.0,
                }
                for (depth, is_decayed), values in sorted(groups.items(), key=lambda group: group[0])
            ],
            **options,
        )
        return self.optimizer

    def accuracy(self, dataset: Dataset[Any]) -> float:
        """Return the accuracy on a dataset, in 0..1."""
        return float(self.predict(dataset).metrics["test_top1"])

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the averaged weights if there are any, else the network's."""
        with self._averaged_weights():
            return self._evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict with the averaged weights if there are any, else with the network's."""
        with self._averaged_weights():
            return super().predict(*args, **kwargs)

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        if self.average is None:
            yield
            return
        own = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.network.load_state_dict(self.average.module.state_dict())
        try:
            yield
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
            time.monotonic() - self.start,
            metrics["eval_macro_f1"],
        )
        self.start = time.monotonic()
        if not math.isfinite(epoch.loss):
            raise DivergedError(self._describe_divergence(epoch))
        is_best = self.history.add(epoch)
        if self.is_world_process_zero():
            if is_best or self.recipe.keep == "last":
                self.save(self.network)
            self.on_epoch(epoch)
        return metrics

    def _describe_divergence(self, epoch: Epoch) -> str:
        saved = self.history.saved(self.recipe.keep)
        what = "no network is saved" if saved is None else f"the network of epoch {saved.epoch} is saved"
        return (
            f"the training diverged, the validation loss of epoch {epoch.epoch} is {epoch.loss}, and {what}: use another "
            "folder with a lower --learning-rate"
        )


def _averaged(network: nn.Module, decay: float) -> AveragedModel:
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]


class _StepCallback(TrainerCallback):
    """Seeds steps, updates the average, stops early, and completes checkpoints."""

    def __init__(self, trainer: DinatTrainer) -> None:
        self._trainer = trainer

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Seed the random number generator by step, so that a resumed training draws the same numbers."""
        torch.manual_seed((args.seed * 1_000_003 + state.global_step) * 1024 + args.process_index)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Update the moving average."""
        if self._trainer.average is not None:
            self._trainer.average.update_parameters(self._trainer.network)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop early."""
        history, patience = self._trainer.history, self._trainer.recipe.patience
        if patience and len(history.epochs) - 1 - history.best >= patience:
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save the average, then the history. The history is written last: it marks the checkpoint as complete."""
        if not state.is_world_process_zero:
            return
        assert args.output_dir is not None
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._trainer.average is not None:
            weights = {name: value.contiguous() for name, value in self._trainer.average.state_dict().items()}
            save_file(weights, folder / AVERAGE_FILE)
        temporary = folder / f"{HISTORY_FILE}.part"
        temporary.write_text(json.dumps(asdict(self._trainer.history)))
        os.replace(temporary, folder / HISTORY_FILE)


class ProgressBarCallback(TrainerCallback):
    """Shows the number of steps in a progress bar."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """See TrainerCallback."""
        self._task = self._progress.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """See TrainerCallback."""
        self._progress.update(self._task, completed=state.global_step)


def accuracies(prediction: EvalPrediction) -> dict[str, float]:
    """Compute top1 and top5 accuracy and macro_f1, the mean F1 of the classes that have images, in 0..1."""
    logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    hits = best == labels[:, None]
    macro_f1 = f1_score(labels, best[:, 0], labels=np.unique(labels), average="macro", zero_division=0.0)
    return {"top1": float(hits[:, 0].mean()), "top5": float(hits.any(axis=1).mean()), "macro_f1": float(macro_f1)}


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Return the last complete checkpoint. Later ones, incomplete after a kill or a power failure, are deleted."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if (checkpoint / HISTORY_FILE).exists() and all(_is_complete(file) for file in checkpoint.iterdir()):
            return checkpoint
        shutil.rmtree(checkpoint)
    return None


def _is_complete(file: Path) -> bool:
    """Return whether a file is not cut short, as far as its format shows that."""
    try:
        if file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass
        elif file.suffix in (".pt", ".pth"):
            return is_zipfile(file)
    except (OSError, ValueError, SafetensorError):
        return False
    return True
