"""Classification losses."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinat.model.config import DinatConfig
from dinat.model.errors import ConfigError


def classification_loss(logits: Tensor, labels: Tensor, config: DinatConfig) -> Tensor:
    """Compute the loss for config.problem_type.

    The loss is the mean squared error for regression, cross entropy for single_label_classification, and binary cross entropy
    for multi_label_classification. As in transformers, a problem_type of None is derived from the labels and stored in config.

    Args:
        logits: (B, num_labels).
        labels: Classes (B,) int64, with -100 ignored; or (B, num_labels) or (B,) of a floating dtype.
        config: Configuration of the network.

    Returns:
        Scalar loss.

    Raises:
        ConfigError: problem_type is unknown.
    """
    if config.problem_type is None:
        if config.num_labels == 1:
            config.problem_type = "regression"
        elif labels.dtype in (torch.long, torch.int):
            config.problem_type = "single_label_classification"
        else:
            config.problem_type = "multi_label_classification"
    if config.problem_type == "regression":
        return F.mse_loss(logits.squeeze(), labels.squeeze()) if config.num_labels == 1 else F.mse_loss(logits, labels)
    if config.problem_type == "single_label_classification":
        return F.cross_entropy(logits.view(-1, config.num_labels), labels.view(-1).long())
    if config.problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels)
    raise ConfigError(
        f"problem_type {config.problem_type!r} is not known: use one of regression, single_label_classification, "
        "multi_label_classification"
    )
