"""Train a classifier: from labelled images to a checkpoint folder."""

import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils.logging import disable_progress_bar

from dinat.app.evaluation.labelled_images import DataError
from dinat.app.host import cores
from dinat.app.training.augmentation import Augmentation
from dinat.app.training.dataset import LabelledImageDataset, collate
from dinat.app.training.model_card import write_model_card
from dinat.app.training.recipe import Recipe
from dinat.app.training.spec import DataSplit, TrainingResult, TrainingSpec, read_split
from dinat.app.training.trainer import DinatTrainer, Epoch, History, ProgressBarCallback, last_complete_checkpoint
from dinat.model import DinatConfig, DinatError, DinatImageProcessor, hf
from dinat.model.checkpoints.checkpoint import Checkpoint, match_state_dict, open_checkpoint, save_checkpoint
from dinat.model.checkpoints.transfer import HEAD, transfer

STATE_FILE, CHECKPOINTS = "training.json", "checkpoints"


class TrainingError(DinatError):
    """A training that cannot start or resume."""


def train(
    spec: TrainingSpec,
    *,
    device: str = "auto",
    workers: int | None = None,
    report: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> TrainingResult:
    """Train, or resume an interrupted training of the same specification.

    The output folder always contains the best weights so far, written atomically.

    Args:
        spec: What to train, and how.
        device: "auto" or "cpu". On several GPUs, each process started by accelerate or torchrun uses one.
        workers: Data loading processes. If None, one per CPU core on a GPU, and none on a CPU, whose cores compute the network.
        report: Called with each status message.
        progress: Shows a progress bar.

    Raises:
        TrainingError: The output folder has other content, or the network does not have a fixed input size.
        DataError: The data cannot be read, or has too few classes or images.
        CheckpointError: The checkpoint cannot be loaded.
        ConfigError: The recipe does not fit the network.
    """
    recipe, split = spec.recipe, read_split(spec)
    for folder in split.empty_folders:
        report(f"{folder} has no image: the class is skipped")
    torch.manual_seed(recipe.seed)
    checkpoint = open_checkpoint(spec.source, revision=spec.revision)
    network, config, processor, changes = _build(checkpoint, split, recipe)
    arguments = _training_arguments(spec, device, workers, len(split.train))
    resumed = _open_folder(spec, split, is_main=arguments.process_index == 0)
    _report_start(report, split, changes, spec, resumed)
    start = time.perf_counter()

    def save(best: nn.Module) -> None:
        processor.save_pretrained(spec.out)
        save_checkpoint(spec.out, config, best.state_dict(), architecture="DinatForImageClassification")

    def report_epoch(epoch: Epoch) -> None:
        report(
            f"epoch {epoch.epoch} of {recipe.epochs}: training loss {epoch.train_loss:.4f}, validation loss {epoch.loss:.4f}, "
            f"top-1 {epoch.top1:.2%}, top-5 {epoch.top5:.2%}, {epoch.seconds:.0f} s"
        )

    class_of = {label: index for index, label in enumerate(split.classes)}
    validation = LabelledImageDataset(split.validation, class_of, lambda image, _: processor(image)[0], spec.max_pixels)
    augmentation = Augmentation(recipe, processor)
    training = LabelledImageDataset(split.train, class_of, augmentation, spec.max_pixels, recipe.seed)
    trainer = DinatTrainer(
        network,
        arguments,
        recipe,
        save,
        report_epoch,
        train_dataset=training,
        eval_dataset=validation,
        data_collator=collate,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if progress is not None and arguments.process_index == 0:
        trainer.add_callback(ProgressBarCallback(progress))
    if resumed is not None:
        trainer.resume_from(resumed)
    epochs_before = len(trainer.history.epochs)
    try:
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    except DataError as error:  # from a data loading process the message contains a traceback
        message = str(error).rpartition("DataError: ")[2].strip()
        raise DataError(f"{message}; replace or remove the file, then run the same command again") from None
    seconds = time.perf_counter() - start
    images_seen = (len(trainer.history.epochs) - epochs_before) * len(split.train)
    saved = trainer.history.epochs[trainer.history.best if recipe.keep == "best" else -1]
    result = TrainingResult(split, trainer.history, saved, seconds, images_seen / seconds)
    if arguments.process_index == 0:
        write_model_card(spec, result, config, changes)
        _write_state(spec, split, finished=True)
        shutil.rmtree(spec.out / CHECKPOINTS)
    return result


def _build(
    checkpoint: Checkpoint, split: DataSplit, recipe: Recipe
) -> tuple[nn.Module, DinatConfig, DinatImageProcessor, list[str]]:
    """Return the network, its configuration, its image processor, and a description of each change from the checkpoint."""
    processor = DinatImageProcessor.from_pretrained(checkpoint)
    if recipe.size is not None:
        unchanged = {"resample": processor.resample, "image_mean": processor.image_mean, "image_std": processor.image_std}
        processor = DinatImageProcessor(size=recipe.size, **unchanged)  # type: ignore[arg-type]
    size = processor.output_size
    if size is None:
        raise TrainingError(f"{checkpoint.source} keeps the aspect ratio of images, training requires a fixed size: set --size")
    transferred = transfer(
        checkpoint,
        split.classes,
        size=recipe.size,
        kernel_size=recipe.kernel_size,
        drop_path_rate=recipe.drop_path,
    )
    config, changes = transferred.config, list(transferred.changes)
    network = hf.DinatForImageClassification(hf.DinatConfig(**config.to_dict()))
    if recipe.weights == "random":
        changes = [change for change in changes if "head" not in change] + ["all weights are random"]
    else:
        new_head = {key: value for key, value in network.state_dict().items() if key in HEAD}
        expected = network.state_dict()
        network.load_state_dict(match_state_dict(new_head | transferred.state_dict, expected, checkpoint.source))
    return network, config, processor, changes


def _training_arguments(spec: TrainingSpec, device: str, workers: int | None, num_images: int) -> TrainingArguments:
    """Convert a recipe to Trainer's arguments."""
    recipe = spec.recipe
    use_cpu = device == "cpu" or not torch.cuda.is_available()
    precision = recipe.precision
    if precision == "auto":
        precision = "bf16" if not use_cpu and torch.cuda.is_bf16_supported() else "fp32"
    disable_progress_bar()  # type: ignore[no-untyped-call]  # of saving a single file
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)  # it warns about missing tokens, which images never have
    with warnings.catch_warnings(action="ignore"):
        arguments = TrainingArguments(
            output_dir=str(spec.out / CHECKPOINTS),
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
    steps = -(-num_images // (recipe.batch_size * recipe.accumulate * arguments.world_size)) * recipe.epochs
    arguments.warmup_steps = round(recipe.warmup * steps)
    if not use_cpu and arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one GPU per process; Trainer would use all by nn.DataParallel, which is slower than one
    return arguments


def _open_folder(spec: TrainingSpec, split: DataSplit, is_main: bool) -> Path | None:
    """Create the output folder, or check that it has an interrupted training of the same specification.

    Returns:
        The checkpoint to resume from, or None.

    Raises:
        TrainingError: The folder has other content, or a training that is finished or differs.
    """
    state_file = spec.out / STATE_FILE
    if not state_file.exists():
        if spec.out.exists() and any(spec.out.iterdir()):
            raise TrainingError(f"{spec.out} exists and does not contain a training: use another folder")
        if is_main:
            spec.out.mkdir(parents=True, exist_ok=True)
            _write_state(spec, split, finished=False)
        return None
    stored = json.loads(state_file.read_text())
    if stored["finished"]:
        raise TrainingError(f"{spec.out} contains a finished training: use another folder")
    current = _state(spec, split)
    differences = spec.recipe.differences(Recipe(**stored["recipe"]))
    differences += [
        f"{name} is {current[name]}, was {stored[name]}"
        for name in ("source", "data", "validate_on")
        if current[name] != stored[name]
    ]
    if not differences and current["digest"] != stored["digest"]:
        differences = ["the data has other images"]
    if differences:
        raise TrainingError(f"{spec.out} contains an interrupted training that differs: {'; '.join(differences)}")
    return last_complete_checkpoint(spec.out / CHECKPOINTS)


def _state(spec: TrainingSpec, split: DataSplit) -> dict[str, Any]:
    return {
        "source": spec.source,
        "data": str(spec.data),
        "validate_on": None if spec.validate_on is None else str(spec.validate_on),
        "digest": split.digest(),
        "recipe": spec.recipe.model_dump(),
    }


def _write_state(spec: TrainingSpec, split: DataSplit, finished: bool) -> None:
    (spec.out / STATE_FILE).write_text(json.dumps(_state(spec, split) | {"finished": finished}, indent=2) + "\n")


def _report_start(
    report: Callable[[str], None], split: DataSplit, changes: list[str], spec: TrainingSpec, resumed: Path | None
) -> None:
    report(
        f"{len(split.train) + len(split.validation)} images of {len(split.classes)} classes: "
        f"{len(split.train)} for training, {len(split.validation)} for validation"
    )
    for change in changes:
        report(f"{spec.source}: {change}")
    if resumed is not None:
        report(f"resuming after epoch {len(History.read(resumed).epochs)}")
