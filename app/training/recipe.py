"""Hyperparameters of a training."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]


class Recipe(BaseModel):
    """Everything that a training depends on besides its data and its initial checkpoint. Equal recipes give equal weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: Positive | None = Field(
        None,
        description="Passes over the training images. Default: at least 10, and enough for 300 steps, or for 1000 if the "
        "network has to learn its features (random weights, or a checkpoint of few and other classes).",
    )
    batch_size: Positive = Field(32, description="Images per step on each device.")
    accumulate: Positive = Field(1, description="Batches whose gradients are accumulated before an optimizer step.")
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Peak learning rate, after the warm-up; then cosine decay to 0. Default: 1e-4, or up to 3e-3 by the "
        "network's width if it has to learn its features.",
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1, description="Factor of the learning rate per layer, from the head down (arXiv 2106.08254), such as 0.8."
    )
    freeze: str = Field(
        "none", description="Weights that are not trained: backbone (all but the head), or the stem and stages up to this one."
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="Weights of classes in the loss; balanced: inversely proportional to their numbers of images."
    )
    warmup: Fraction = Field(0.1, description="Fraction of the steps in which the learning rate rises linearly from 0.")
    weight_decay: float = Field(
        0.05, ge=0, description="Weight decay of AdamW, for all weights but biases, norms and relative positional biases."
    )
    clip: float = Field(1.0, ge=0, description="Maximum norm of the gradients; 0 disables clipping.")
    label_smoothing: Fraction = Field(0.1, description="Label smoothing factor.")
    mixup: float = Field(0, ge=0, description="Alpha of mixup (arXiv 1710.09412), usually 0.8; 0 disables it.")
    cutmix: float = Field(
        0,
        ge=0,
        description="Alpha of CutMix (arXiv 1905.04899), usually 1; 0 disables it. With mixup, one of the two per batch.",
    )
    area: Annotated[float, Field(gt=0, le=1)] = Field(0.35, description="Minimum fraction of the image area of a random crop.")
    flip: Fraction = Field(0.5, description="Probability of a horizontal flip.")
    augment: Literal["none", "trivial"] = Field(
        "trivial", description="Random image operation: none, or TrivialAugment (arXiv 2103.10158)."
    )
    erase: Fraction = Field(0, description="Probability of random erasing (arXiv 1708.04896).")
    drop_path: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Stochastic depth rate. Default: the checkpoint's."
    )
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0,
        description="Decay of an exponential moving average of the weights, which is then evaluated and saved; 0 disables it.",
    )
    patience: int = Field(
        0, ge=0, description="Stop after this many epochs without a better validation accuracy; 0 disables early stopping."
    )
    keep: Literal["best", "last"] = Field(
        "best", description="Epoch whose weights are saved: the best by validation accuracy, or the last."
    )
    validation: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="Fraction of DATA to hold out for validation, from each class."
    )
    size: Positive | None = Field(None, description="Height and width of the input in pixels. Default: the checkpoint's.")
    kernel_size: Positive | None = Field(None, description="Kernel size of the attention. Default: the checkpoint's.")
    weights: Literal["checkpoint", "random"] = Field("checkpoint", description="Initial weights.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Numerical precision. auto: bf16 on a GPU that supports it, else fp32."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass, which takes less memory and more time."
    )
    seed: int = Field(0, ge=0, description="Random seed.")

    @model_validator(mode="after")
    def _check_early_stopping(self) -> Self:
        if self.patience and self.keep == "last":
            raise ValueError("patience requires keep=best: early stopping ends long after the best epoch")
        return self

    def differences(self, other: "Recipe") -> list[str]:
        """Describe the fields that differ from another recipe, such as "batch_size is 16, was 32"."""
        own, previous = self.model_dump(), other.model_dump()
        return [f"{name} is {value}, was {previous[name]}" for name, value in own.items() if value != previous[name]]
