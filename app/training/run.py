"""A training from its data to a folder that can be served."""

import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils.logging import disable_progress_bar

from dinat.app.evaluation.labelled_images import DataError
from dinat.app.host import cores
from dinat.app.training.augmentation import Augmentation
from dinat.app.training.data import Pictures, together
from dinat.app.training.model_card import write_card
from dinat.app.training.recipe import Recipe
from dinat.app.training.task import Parts, Task, Trained, read_parts
from dinat.app.training.trainer import Bar, DinatTrainer, Epoch, Progressed, last_whole
from dinat.model import DinatConfig, DinatError, DinatImageProcessor, hf
from dinat.model.checkpoints.checkpoint import Checkpoint, match_state_dict, open_checkpoint, save_checkpoint
from dinat.model.checkpoints.transfer import HEAD, transfer

STATE, CHECKPOINTS = "training.json", "checkpoints"


class TrainingError(DinatError):
    """A training that cannot begin, or go on."""


def train(
    task: Task,
    *,
    device: str = "auto",
    workers: int | None = None,
    say: Callable[[str], None] = print,
    bar: Any = None,
) -> Trained:
    """Train, or go on where the same training was stopped; the best weights so far are always in the folder, whole.

    device: auto or cpu; of several cards, the processes that accelerate or torchrun start take one each.  workers: processes
    that prepare pictures; one a core beside a card, and none on a CPU, which has other work, if None.  say: is given lines for
    people.  bar: a rich Progress that shows how far it is.  Raises TrainingError, DataError, CheckpointError, ConfigError.
    """
    recipe, parts = task.recipe, read_parts(task)
    for folder in parts.empty:
        say(f"{folder} has no picture: the class is left out")
    torch.manual_seed(recipe.seed)
    checkpoint = open_checkpoint(task.source, revision=task.revision)
    network, config, processor, changes = _network(checkpoint, parts, recipe)
    arguments = _arguments(task, device, workers, len(parts.train))
    resumed = _enter(task, parts, is_main=arguments.process_index == 0)
    _say_what(say, parts, changes, task, resumed)
    began = time.perf_counter()

    def keep(best: nn.Module) -> None:
        processor.save_pretrained(task.out)
        save_checkpoint(task.out, config, best.state_dict(), architecture="DinatForImageClassification")

    def said(epoch: Epoch) -> None:
        say(
            f"epoch {epoch.epoch} of {recipe.epochs}: loss {epoch.train_loss:.4f}, on the validation {epoch.loss:.4f}, "
            f"top-1 {epoch.top1:.2%}, top-5 {epoch.top5:.2%}, {epoch.seconds:.0f} s"
        )

    class_of = {label: index for index, label in enumerate(parts.classes)}
    plain = Pictures(parts.held_back, class_of, lambda picture, _: processor(picture)[0], task.max_pixels)
    changed = Pictures(parts.train, class_of, Augmentation(recipe, processor), task.max_pixels, recipe.seed)
    trainer = DinatTrainer(
        network, arguments, recipe, keep, said, train_dataset=changed, eval_dataset=plain, data_collator=together
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if bar is not None and arguments.process_index == 0:
        trainer.add_callback(Bar(bar))
    if resumed is not None:
        trainer.go_on_from(resumed)
    before = len(trainer.progress.epochs)
    try:
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    except DataError as error:  # a worker's has its trace in it
        raise DataError(
            f"{str(error).rpartition('DataError: ')[2].strip()}; mend or remove it, and say the same again"
        ) from None
    seconds = time.perf_counter() - began
    seen = (len(trainer.progress.epochs) - before) * len(parts.train)
    kept = trainer.progress.epochs[trainer.progress.best if recipe.keep == "best" else -1]
    trained = Trained(parts, trainer.progress, kept, seconds, seen / seconds)
    if arguments.process_index == 0:
        write_card(task, trained, config, changes)
        _write_state(task, parts, finished=True)
        shutil.rmtree(task.out / CHECKPOINTS)
    return trained


def _network(
    checkpoint: Checkpoint, parts: Parts, recipe: Recipe
) -> tuple[nn.Module, DinatConfig, DinatImageProcessor, list[str]]:
    """What is trained, its configuration as it is saved, its preprocessing, and in words what is not as in the checkpoint."""
    processor = DinatImageProcessor.from_pretrained(checkpoint)
    if recipe.size is not None:
        kept = {"resample": processor.resample, "image_mean": processor.image_mean, "image_std": processor.image_std}
        processor = DinatImageProcessor(size=recipe.size, **kept)  # type: ignore[arg-type]
    size = processor.output_size
    if size is None:
        raise TrainingError(f"{checkpoint.source} takes pictures of any aspect, a batch wants one size: give --size")
    transferred = transfer(
        checkpoint,
        parts.classes,
        size=recipe.size,
        kernel_size=recipe.kernel_size,
        drop_path_rate=recipe.drop_path,
    )
    config, changes = transferred.config, list(transferred.changes)
    network = hf.DinatForImageClassification(hf.DinatConfig(**config.to_dict()))
    if recipe.weights == "random":
        changes = [change for change in changes if "head" not in change] + ["all weights are new"]
    else:
        fresh = {key: value for key, value in network.state_dict().items() if key in HEAD}
        expected = network.state_dict()
        network.load_state_dict(match_state_dict(fresh | transferred.state_dict, expected, checkpoint.source))
    return network, config, processor, changes


def _arguments(task: Task, device: str, workers: int | None, pictures: int) -> TrainingArguments:
    """A recipe in Trainer's words."""
    recipe = task.recipe
    use_cpu = device == "cpu" or not torch.cuda.is_available()
    precision = recipe.precision
    if precision == "auto":
        precision = "bf16" if not use_cpu and torch.cuda.is_bf16_supported() else "fp32"
    disable_progress_bar()  # type: ignore[no-untyped-call]  # of the single file that is written
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)  # it talks of tokens that no picture has
    with warnings.catch_warnings(action="ignore"):
        arguments = TrainingArguments(
            output_dir=str(task.out / CHECKPOINTS),
            num_train_epochs=recipe.epochs,
            per_device_train_batch_size=recipe.batch_size,
            per_device_eval_batch_size=recipe.batch_size,
            gradient_accumulation_steps=recipe.accumulate,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="cosine",
            weight_decay=recipe.weight_decay,
            max_grad_norm=recipe.clip,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            gradient_checkpointing=recipe.gradient_checkpointing,
            seed=recipe.seed,
            data_seed=recipe.seed,
            use_cpu=use_cpu,
            dataloader_num_workers=(0 if use_cpu else cores()) if workers is None else workers,
            dataloader_pin_memory=not use_cpu,
            eval_strategy="epoch",
            save_strategy="epoch",
            logging_strategy="epoch",
            save_total_limit=2,
            remove_unused_columns=False,
            label_names=["labels"],
            report_to="none",
            disable_tqdm=True,
        )
    steps = -(-pictures // (recipe.batch_size * recipe.accumulate * arguments.world_size)) * recipe.epochs
    arguments.warmup_steps = round(recipe.warmup * steps)
    if not use_cpu and arguments.n_gpu > 1:
        arguments._n_gpu = 1  # a process drives one card; Trainer would take all by nn.DataParallel, which is slower than one
    return arguments


def _enter(task: Task, parts: Parts, is_main: bool) -> Path | None:
    """Take the folder for this training; the checkpoint that it goes on from, or None. Raises TrainingError."""
    state = task.out / STATE
    if not state.exists():
        if task.out.exists() and any(task.out.iterdir()):
            raise TrainingError(f"{task.out} is there and holds something else than a training: name another folder")
        if is_main:
            task.out.mkdir(parents=True, exist_ok=True)
            _write_state(task, parts, finished=False)
        return None
    then = json.loads(state.read_text())
    if then["finished"]:
        raise TrainingError(f"{task.out} holds a training that is finished: name another folder")
    now = _state(task, parts)
    different = task.recipe.changed(Recipe(**then["recipe"]))
    different += [
        f"{name} {now[name]}, {then[name]} before" for name in ("source", "data", "validate_on") if now[name] != then[name]
    ]
    if not different and now["digest"] != then["digest"]:
        different = ["other pictures in the data"]
    if different:
        raise TrainingError(f"{task.out} holds a training that was stopped, of something else: {'; '.join(different)}")
    return last_whole(task.out / CHECKPOINTS)


def _state(task: Task, parts: Parts) -> dict[str, Any]:
    return {
        "source": task.source,
        "data": str(task.data),
        "validate_on": None if task.validate_on is None else str(task.validate_on),
        "digest": parts.digest(),
        "recipe": task.recipe.model_dump(),
    }


def _write_state(task: Task, parts: Parts, finished: bool) -> None:
    (task.out / STATE).write_text(json.dumps(_state(task, parts) | {"finished": finished}, indent=2) + "\n")


def _say_what(say: Callable[[str], None], parts: Parts, changes: list[str], task: Task, resumed: Path | None) -> None:
    say(f"{len(parts.train)} pictures of {len(parts.classes)} classes, {len(parts.held_back)} held back")
    for change in changes:
        say(f"{task.source}: {change}")
    if resumed is not None:
        say(f"going on after epoch {len(Progressed.read(resumed).epochs)}")
