"""`dinat info`: print a checkpoint's configuration and size."""

import json
from typing import Any

from dinat.app.cli.flags import Revision, Source
from dinat.model import DinatImageProcessor
from dinat.model.checkpoints.checkpoint import open_checkpoint


def info(source: Source, *, revision: Revision = None) -> None:
    """Print a checkpoint's configuration, number of parameters and image processor as JSON."""
    checkpoint = open_checkpoint(source, revision=revision)
    config = checkpoint.config
    weights = checkpoint.state_dict()
    summary: dict[str, Any] = {
        "source": source,
        "parameters": sum(value.numel() for value in weights.values()),
        "tensors": len(weights),
        "labels": config.num_labels,
        "first labels": [config.id2label[i] for i in range(min(5, config.num_labels))],
        "config": {name: value for name, value in config.to_dict().items() if name not in ("id2label", "label2id")},
        "image processor": DinatImageProcessor.from_pretrained(checkpoint).to_dict(),
    }
    print(json.dumps(summary, indent=2))
