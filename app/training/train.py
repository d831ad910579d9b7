"""Train a classifier: from labelled images to a checkpoint folder."""

import logging
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors import SafetensorError
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils.logging import disable_progress_bar

from dinat.app.evaluation.duplicates import describe_duplicates, describe_overlap
from dinat.app.evaluation.labelled_images import DataError, LabelledImage
from dinat.app.host import cores
from dinat.app.image_paths import describe_skipped
from dinat.app.plurals import plural
from dinat.app.threads import limit_threads
from dinat.app.training.augmentation import Augmentation
from dinat.app.training.dataset import LabelledImageDataset, collate
from dinat.app.training.defaults import resolve
from dinat.app.training.labels import balanced_weights, imbalance
from dinat.app.training.layers import freeze
from dinat.app.training.model_card import write_model_card
from dinat.app.training.output_folder import CHECKPOINTS, Previous, TrainingError, create, find_previous, write_state
from dinat.app.training.readable import cache_file, check_images
from dinat.app.training.recipe import Recipe
from dinat.app.training.spec import DataSplit, TrainingResult, TrainingSpec, read_split
from dinat.app.training.trainer import DinatTrainer, Epoch, History, ProgressBarCallback, last_complete_checkpoint
from dinat.model import DinatConfig, DinatImageProcessor, hf
from dinat.model.checkpoints.checkpoint import Checkpoint, match_state_dict, open_checkpoint, save_checkpoint
from dinat.model.checkpoints.transfer import HEAD, transfer
from dinat.model.writing import is_disk_full

FITTED = 0.9
"""Accuracy on training images, without augmentation, below which a network underfits."""

DIVERGED = 10
"""Validation loss in units of that of equal scores, from which a training has diverged."""

PROBED = 1000
"""Training images that are classified to detect underfitting."""


def train(
    spec: TrainingSpec,
    *,
    device: str = "auto",
    workers: int | None = None,
    skip_broken: bool = False,
    cache_dir: Path,
    report_to: str = "none",
    report: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> TrainingResult:
    """Train, resume an interrupted training of the same specification, or continue a finished one for more epochs.

    The output folder always contains the best weights so far, written atomically.

    Args:
        spec: What to train, and how.
        device: "auto" or "cpu". On several GPUs, each process started by accelerate or torchrun uses one.
        workers: Data loading processes. If None, one per CPU core on a GPU, and none on a CPU, whose cores compute the network.
        skip_broken: Whether to train without the images that cannot be read.
        cache_dir: Folder for the list of images that were checked.
        report_to: Where transformers reports metrics besides: "none", "tensorboard" or "wandb".
        report: Called with each status message.
        progress: Shows a progress bar.

    Raises:
        TrainingError: The output folder has other content or its disk is full, or the network does not have a fixed input size.
        DataError: The data cannot be read, or has too few classes or images.
        DivergedError: The validation loss is NaN or infinite. The output folder has the network of an epoch before, if any.
        CheckpointError: The checkpoint cannot be loaded.
        ConfigError: The recipe does not fit the network.
    """
    limit_threads()
    split = read_split(spec)
    _report_folders(report, split)
    previous = find_previous(spec, split)
    if previous is not None:
        split = previous.split
    split = _readable(split, spec, cache_dir, skip_broken, report)
    checkpoint = open_checkpoint(spec.source, revision=spec.revision)
    arguments = _training_arguments(spec, device, workers, report_to)
    if previous is None:
        recipe = resolve(spec.recipe, checkpoint.config, split.classes, len(split.train), arguments.world_size)
    else:
        recipe = previous.recipe
    _set_schedule(arguments, recipe, len(split.train))
    torch.manual_seed(recipe.seed)
    network, config, processor, changes = _build(checkpoint, split, recipe)
    is_main = arguments.process_index == 0
    if is_main and previous is None:
        with _reported_errors(spec.out):
            create(spec, recipe, split)
    _report_start(report, split, changes, spec, recipe, previous)
    start = time.perf_counter()

    def save(best: nn.Module) -> None:
        processor.save_pretrained(spec.out)
        save_checkpoint(spec.out, config, best.state_dict(), architecture="DinatForImageClassification")

    trainer = _create_trainer(network, arguments, recipe, split, processor, spec.max_pixels, save, report)
    if progress is not None and is_main:
        trainer.add_callback(ProgressBarCallback(progress))
    resumed = previous.checkpoint if previous else None
    if resumed is not None:
        trainer.resume_from(resumed)
    epochs_before = len(trainer.history.epochs)
    with _reported_errors(spec.out):
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        seconds = time.perf_counter() - start
        images_seen = (len(trainer.history.epochs) - epochs_before) * len(split.train)
        saved = trainer.history.saved(recipe.keep)
        assert saved is not None
        fitted = trainer.accuracy(_plain_dataset(_sample(split.train), split.classes, processor, spec.max_pixels))
        result = TrainingResult(recipe, split, trainer.history, saved, seconds, images_seen / seconds, fitted)
        if is_main:
            write_model_card(spec, result, config, changes)
            _delete_checkpoints(spec.out / CHECKPOINTS)
            write_state(spec, recipe, finished=True)
    _report_fit(report, result)
    return result


def _create_trainer(
    network: nn.Module,
    arguments: TrainingArguments,
    recipe: Recipe,
    split: DataSplit,
    processor: DinatImageProcessor,
    max_pixels: int,
    save: Callable[[nn.Module], None],
    report: Callable[[str], None],
) -> DinatTrainer:
    """Create the trainer with its data sets. It reports each epoch."""

    def report_epoch(epoch: Epoch) -> None:
        report(
            f"epoch {epoch.epoch} of {recipe.epochs}: training loss {epoch.train_loss:.4f}, validation loss {epoch.loss:.4f}, "
            f"top-1 {epoch.top1:.2%}, top-5 {epoch.top5:.2%}, macro-F1 {epoch.macro_f1:.2%}, {epoch.seconds:.1f} s"
        )

    augmentation = Augmentation(recipe, processor)
    trainer = DinatTrainer(
        network,
        arguments,
        recipe,
        save,
        report_epoch,
        class_weights=balanced_weights(split.train_counts, split.classes) if recipe.class_weights == "balanced" else None,
        train_dataset=LabelledImageDataset(split.train, split.classes, augmentation, max_pixels, recipe.seed),
        eval_dataset=_plain_dataset(split.validation, split.classes, processor, max_pixels),
        data_collator=collate,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _plain_dataset(
    images: list[LabelledImage], classes: list[str], processor: DinatImageProcessor, max_pixels: int
) -> LabelledImageDataset:
    """Return a data set without augmentation."""
    return LabelledImageDataset(images, classes, lambda image, _: processor(image)[0], max_pixels)


def _readable(
    split: DataSplit, spec: TrainingSpec, cache_dir: Path, skip_broken: bool, report: Callable[[str], None]
) -> DataSplit:
    """Check that all images can be read, and report duplicates. Returns the split without those that cannot.

    Raises:
        DataError: An image cannot be read, and `skip_broken` is false.
    """
    checked = check_images([*split.train, *split.validation], spec.max_pixels, cache_file(cache_dir, spec.data))
    if checked.failed:
        split = _without(split, checked.failed, skip_broken, report)
    _report_duplicates(report, split, checked.digests)
    return split


BROKEN_ADVICE = "replace or remove the file, or use --skip-broken, then run the same command again"


def _without(split: DataSplit, broken: dict[Path, str], skip_broken: bool, report: Callable[[str], None]) -> DataSplit:
    """Return the split without images that cannot be read. Raises DataError without --skip-broken."""
    shown = "; ".join(f"{path}: {reason}" for path, reason in list(broken.items())[:5])
    more = f"; and {len(broken) - 5} more" if len(broken) > 5 else ""
    if not skip_broken:
        raise DataError(f"{shown}{more}; {BROKEN_ADVICE}")
    report(f"{plural(len(broken), 'image that cannot be read is', 'images that cannot be read are')} skipped: {shown}{more}")
    return split.without(broken.keys())


def _sample(images: list[LabelledImage]) -> list[LabelledImage]:
    """Return every n-th image, at most PROBED."""
    return images[:: -(-len(images) // PROBED)]


def _report_fit(report: Callable[[str], None], result: TrainingResult) -> None:
    """Report what to change if the training diverged, or the network underfits."""
    last = result.history.epochs[-1]
    if last.loss > DIVERGED * math.log(len(result.split.classes)):
        report(f"the training diverged, its last validation loss is {last.loss:.3g}: try a lower --learning-rate")
    elif result.fitted < FITTED:
        report(_underfits(result.fitted, result.recipe))


def _underfits(fitted: float, recipe: Recipe) -> str:
    assert recipe.epochs is not None and recipe.learning_rate is not None
    advice = [f"more --epochs ({2 * recipe.epochs})", f"a higher --learning-rate ({3 * recipe.learning_rate:.1g})"]
    advice += ["--augment none"] if recipe.augment != "none" else []
    advice += ["--freeze none"] if recipe.freeze != "none" else []
    return (
        f"the network underfits: it classifies only {fitted:.1%} of its training images correctly; try "
        f"{', '.join(advice[:-1])} or {advice[-1]}"
    )


@contextmanager
def _reported_errors(out: Path) -> Iterator[None]:
    """Raise DataError for an unreadable image with what to do, and TrainingError if the disk of the output folder is full."""
    try:
        yield
    except DataError as error:  # from a data loading process the message contains a traceback
        message = str(error).rpartition("DataError: ")[2].strip()
        raise DataError(f"{message}; {BROKEN_ADVICE}") from None
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        raise TrainingError(f"the disk of {out} is full: free space, then run the same command again to resume") from None


def _delete_checkpoints(folder: Path) -> None:
    """Delete all checkpoints but the last one, from which a training can be continued."""
    last = last_complete_checkpoint(folder)
    for path in folder.glob("checkpoint-*"):
        if path != last:
            shutil.rmtree(path)


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
    changes += freeze(network, recipe.freeze)
    return network, config, processor, changes


def _training_arguments(spec: TrainingSpec, device: str, workers: int | None, report_to: str) -> TrainingArguments:
    """Convert a recipe to Trainer's arguments, without the schedule."""
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
            per_device_train_batch_size=recipe.batch_size,
            per_device_eval_batch_size=recipe.batch_size,
            gradient_accumulation_steps=recipe.accumulate,
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
            report_to=report_to,
            disable_tqdm=True,
        )
    if not use_cpu and arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one GPU per process; Trainer would use all by nn.DataParallel, which is slower than one
    return arguments


def _set_schedule(arguments: TrainingArguments, recipe: Recipe, num_images: int) -> None:
    """Set the number of epochs and the learning rate."""
    assert recipe.epochs is not None and recipe.learning_rate is not None
    steps = -(-num_images // (recipe.batch_size * recipe.accumulate * arguments.world_size)) * recipe.epochs
    arguments.num_train_epochs = recipe.epochs
    arguments.learning_rate = recipe.learning_rate
    arguments.warmup_steps = round(recipe.warmup * steps)


def _report_folders(report: Callable[[str], None], split: DataSplit) -> None:
    for folder in split.empty_folders:
        report(f"{folder} has no image: the class is skipped")
    for folder in split.unused_folders:
        report(f"{folder} is not used")
    for note in split.notes:
        report(note)
    if split.skipped:
        report(describe_skipped(split.skipped))


def _report_duplicates(report: Callable[[str], None], split: DataSplit, digests: Mapping[Path, str]) -> None:
    for line in describe_duplicates([*split.train, *split.validation], digests):
        report(line)
    overlap = describe_overlap(split.train, split.validation, digests)
    if overlap is not None:
        report(overlap)


def _report_start(
    report: Callable[[str], None],
    split: DataSplit,
    changes: list[str],
    spec: TrainingSpec,
    recipe: Recipe,
    previous: Previous | None,
) -> None:
    report(
        f"{plural(len(split.train) + len(split.validation), 'image')} of {plural(len(split.classes), 'class', 'classes')}: "
        f"{len(split.train)} for training, {len(split.validation)} for validation"
    )
    warning = imbalance(split.train_counts)
    if warning is not None and recipe.class_weights == "none":
        report(warning)
    for change in changes:
        report(f"{spec.source}: {change}")
    assert recipe.epochs is not None
    report(f"{plural(recipe.epochs, 'epoch')}, learning rate {recipe.learning_rate:.2g}")
    if previous is not None and previous.num_missing:
        report(f"the interrupted training had {plural(previous.num_missing, 'image')} more, which no longer exist")
    if previous is not None and previous.checkpoint is not None:
        report(f"resuming after epoch {len(History.read(previous.checkpoint).epochs)}")
