"""`dinat info`: say what is in a checkpoint."""

import argparse
import json
from typing import Any

from model import DinatImageProcessor
from model.checkpoint import open_checkpoint


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The checkpoint."""
    command.add_argument("source", help='folder, Hub id, .pth file or "digits"')
    command.add_argument("--revision", help="branch, tag or commit of a Hub id")


def run(parsed: argparse.Namespace) -> int:
    """Print what a checkpoint is, as JSON."""
    checkpoint = open_checkpoint(parsed.source, revision=parsed.revision)
    config = checkpoint.config
    weights = checkpoint.state_dict()
    summary: dict[str, Any] = {
        "source": parsed.source,
        "parameters": sum(value.numel() for value in weights.values()),
        "tensors": len(weights),
        "labels": config.num_labels,
        "first labels": [config.id2label[i] for i in range(min(5, config.num_labels))],
        "config": {name: value for name, value in config.to_dict().items() if name not in ("id2label", "label2id")},
        "image processor": DinatImageProcessor.from_pretrained(parsed.source, revision=parsed.revision).to_dict(),
    }
    print(json.dumps(summary, indent=2))
    return 0
