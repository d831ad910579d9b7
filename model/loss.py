"""The loss of a classifier, by its configuration."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinat.model.config import DinatConfig
from dinat.model.errors import ConfigError


def classification_loss(logits: Tensor, labels: Tensor, config: DinatConfig) -> Tensor:
    """Mean squared error, cross entropy (-100 is ignored) or binary cross entropy, by config.problem_type.

    A problem_type of None is decided by the labels, and kept in the configuration, as transformers does.
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
        f"problem_type {config.problem_type!r} is not known: take one of regression, single_label_classification, "
        "multi_label_classification"
    )
