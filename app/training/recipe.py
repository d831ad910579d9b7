"""How a classifier is trained: every choice, once."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]


class Recipe(BaseModel):
    """What a training depends on beside its data and the checkpoint that it starts from; the same recipe, the same weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: Positive = Field(10, description="times that every picture is seen")
    batch_size: Positive = Field(32, description="pictures a step, on each device")
    accumulate: Positive = Field(1, description="batches whose gradients make one step of the optimizer")
    learning_rate: float = Field(1e-4, gt=0, description="at its highest, after the warm-up; it ends at 0, by a cosine")
    warmup: Share = Field(0.1, description="share of the steps in which the learning rate rises to it")
    weight_decay: float = Field(0.05, ge=0, description="AdamW's, of all weights but biases, norms and positional biases")
    clip: float = Field(1.0, ge=0, description="largest norm of the gradient; 0 for any")
    label_smoothing: Share = Field(0.1, description="share of a label that is spread over all classes")
    mixup: float = Field(0, ge=0, description="alpha of mixup (arXiv 1710.09412), 0.8 is usual; 0 for none")
    cutmix: float = Field(
        0, ge=0, description="alpha of cutmix (arXiv 1905.04899), 1 is usual; 0 for none; with both, by turns"
    )
    area: Annotated[float, Field(gt=0, le=1)] = Field(0.35, description="smallest share of a picture that is cut out of it")
    flip: Share = Field(0.5, description="how often a picture is mirrored, left to right")
    augment: Literal["none", "trivial"] = Field("trivial", description="trivial: TrivialAugment (arXiv 2103.10158)")
    erase: Share = Field(0, description="how often a rectangle becomes noise (random erasing, arXiv 1708.04896)")
    drop_path: Annotated[float, Field(ge=0, lt=1)] | None = Field(None, description="stochastic depth; the checkpoint's own")
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0, description="decay of the weights' moving average, which is then what is evaluated and kept; 0 for none"
    )
    patience: int = Field(0, ge=0, description="epochs without a better accuracy after which it stops early; 0 for never")
    keep: Literal["best", "last"] = Field("best", description="which epoch's weights are kept, by accuracy on the validation")
    validation: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="share of DATA that is held back, of every class")
    size: Positive | None = Field(None, description="pixels of a side; the checkpoint's own")
    kernel_size: Positive | None = Field(None, description="of the attention; the checkpoint's own")
    weights: Literal["checkpoint", "random"] = Field("checkpoint", description="random: from the start")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="auto: bf16 on a GPU that has it, else fp32")
    gradient_checkpointing: bool = Field(False, description="compute layers twice, for less memory")
    seed: int = Field(0, ge=0, description="of all that is drawn")

    @model_validator(mode="after")
    def _early_stop_keeps_the_best(self) -> Self:
        if self.patience and self.keep == "last":
            raise ValueError("patience stops where the best is long past, keep says last: one of them must go")
        return self

    def changed(self, other: "Recipe") -> list[str]:
        """The fields that differ from another recipe's: "epochs 3, 10 before"."""
        mine, theirs = self.model_dump(), other.model_dump()
        return [f"{name} {value}, {theirs[name]} before" for name, value in mine.items() if value != theirs[name]]

    def chosen(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        return self.model_dump(exclude_defaults=True)
