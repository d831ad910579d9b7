"""The command `dinat`: serve a checkpoint, convert one, or say what is in one."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import uvicorn
from pydantic import ValidationError

from app.allocator import keep_freed_memory
from app.engine.engine import Engine
from app.errors import ServiceError
from app.images import decode
from app.logs import configure_logs
from app.main import create_app
from app.server import Server
from app.settings import Settings, explain
from model import DinatConfig, DinatError, DinatForImageClassification, DinatImageProcessor
from model.checkpoint import open_checkpoint
from model.config import PRESETS
from model.export import FORMATS, export, format_of, quantize


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status. What the user got wrong ends in one line on standard error."""
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except ValidationError as error:
        return _fail(explain(error))
    except DinatError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(str(error))


def serve(parsed: argparse.Namespace) -> int:
    """Serve until a signal says stop."""
    given = {name: value for name in Settings.model_fields if (value := getattr(parsed, name)) is not None}
    settings = Settings(**given)
    configure_logs(settings.log_format)
    keep_freed_memory()
    engine = Engine(settings)
    config = uvicorn.Config(
        create_app(settings, engine),
        host=settings.host,
        port=settings.port,
        server_header=False,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,
    )
    server = Server(config, engine)
    server.run()
    if engine.failure is not None:
        return _fail(f"{settings.model} cannot be served: {engine.failure}")
    return 0 if server.started else 1


def convert(parsed: argparse.Namespace) -> int:
    """Write a checkpoint of any kind in the Hub's layout."""
    config = None
    labels = parsed.labels.read_text().splitlines() if parsed.labels else None
    if parsed.preset:
        config = DinatConfig.preset(parsed.preset, **({"num_labels": len(labels)} if labels else {}))
    network = DinatForImageClassification.from_pretrained(parsed.source, config=config)
    if labels is not None:
        if len(labels) != network.num_labels:
            raise DinatError(f"{parsed.labels} names {len(labels)} labels, one a line; the checkpoint has {network.num_labels}")
        network.config.id2label = dict(enumerate(labels))
        network.config.label2id = {label: index for index, label in enumerate(labels)}
    network.save_pretrained(parsed.destination)
    DinatImageProcessor.from_pretrained(parsed.source, config=config).save_pretrained(parsed.destination)
    print(f"{parsed.source} written to {parsed.destination}")
    return 0


def info(parsed: argparse.Namespace) -> int:
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


def export_graph(parsed: argparse.Namespace) -> int:
    """Write a checkpoint as a graph that its runtime opens without this project."""
    file_format = parsed.format or format_of(parsed.file)
    network = DinatForImageClassification.from_pretrained(parsed.source, revision=parsed.revision)
    processor = DinatImageProcessor.from_pretrained(parsed.source, revision=parsed.revision)
    difference = export(
        network, processor, parsed.file, file_format, batch=parsed.batch, size=parsed.size, features=parsed.features
    )
    print(f"{parsed.source} written to {parsed.file}; its outputs are within {difference:.1e} of PyTorch's")
    return 0


def quantize_graph(parsed: argparse.Namespace) -> int:
    """Write a checkpoint with an 8-bit graph beside its weights, and say what it costs."""
    pictures = []
    for path in sorted(path for path in parsed.pictures.rglob("*") if path.is_file()):
        try:
            pictures.append(decode(path.read_bytes(), Settings.model_fields["max_pixels"].default))
        except ServiceError as error:
            print(f"dinat: {path} is left out: {error.detail}", file=sys.stderr)
    network = DinatForImageClassification.from_pretrained(parsed.source, revision=parsed.revision)
    processor = DinatImageProcessor.from_pretrained(parsed.source, revision=parsed.revision)
    cost = quantize(network, processor, pictures, parsed.destination)
    network.save_pretrained(parsed.destination)
    processor.save_pretrained(parsed.destination)
    print(
        f"{parsed.source} written to {parsed.destination}. On its {cost.pictures} pictures the 8-bit graph has the same best "
        f"class for {cost.same_top1:.1%}, and logits within {cost.difference:.3g}, where the largest is {cost.largest:.3g}.\n"
        f"Serve it with: dinat serve --model {parsed.destination} --precision int8"
    )
    return 0


def _size(text: str) -> tuple[int, int]:
    height, x, width = text.partition("x")
    try:
        sides = int(height), int(width if x else height)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give HEIGHTxWIDTH, such as 224x224") from None
    if min(sides) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: both sides must be at least 1")
    return sides


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no batch: give dynamic, or a number of at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dinat", description="Serve, convert and inspect DiNAT image classifiers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "serve", help="answer HTTP requests", description="Every flag can also be set as DINAT_..., in capitals."
    )
    for name, field in Settings.model_fields.items():
        command.add_argument(f"--{name.replace('_', '-')}", dest=name, metavar=name.upper(), help=field.description)
    command.set_defaults(run=serve)

    command = commands.add_parser("convert", help="write a checkpoint in the Hub's layout")
    command.add_argument("source", help="folder, Hub id, original .pth or .pth.tar file")
    command.add_argument("destination", type=Path, help="folder to write")
    command.add_argument("--preset", choices=PRESETS, help="which published model a .pth file is, where its name does not say")
    command.add_argument("--labels", type=Path, help="file with the names of the classes, one a line")
    command.set_defaults(run=convert)

    command = commands.add_parser("export", help="write a graph for ONNX Runtime, OpenVINO or torch.export")
    command.add_argument("source", help='folder, Hub id, .pth file or "digits"')
    command.add_argument("file", type=Path, help="file to write: *.onnx, *.xml (and *.bin beside it) or *.pt2")
    command.add_argument("--format", choices=FORMATS, help="of the file; by its name if not given")
    command.add_argument("--batch", type=_batch, default=None, metavar="dynamic|N", help="pictures per call; dynamic for any")
    command.add_argument("--size", type=_size, metavar="HxW", help="of the input, in pixels; the checkpoint's if not given")
    command.add_argument(
        "--features", type=_names, default=(), help="comma list of maps to give besides logits: stem, stage1, ..., pooled"
    )
    command.add_argument("--revision", help="branch, tag or commit of a Hub id")
    command.set_defaults(run=export_graph)

    command = commands.add_parser("quantize", help="write a checkpoint with an 8-bit graph for a CPU")
    command.add_argument("source", help='folder, Hub id, .pth file or "digits"')
    command.add_argument("pictures", type=Path, help="folder of pictures to calibrate with, a few hundred like those to come")
    command.add_argument("destination", type=Path, help="folder to write")
    command.add_argument("--revision", help="branch, tag or commit of a Hub id")
    command.set_defaults(run=quantize_graph)

    command = commands.add_parser("info", help="say what is in a checkpoint")
    command.add_argument("source", help='folder, Hub id, .pth file or "digits"')
    command.add_argument("--revision", help="branch, tag or commit of a Hub id")
    command.set_defaults(run=info)
    return parser


def _fail(message: str) -> int:
    print(f"dinat: {message}", file=sys.stderr)
    return 1


def run() -> None:
    """Entry point of the console command."""
    sys.exit(main())


if __name__ == "__main__":
    run()
