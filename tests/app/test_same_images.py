"""One walk, one table reader, one decoder and one body parser for all commands and endpoints."""

import ast
import json
import shutil
from pathlib import Path

import pyarrow.dataset as ds
import pytest

from dinat.app.cli import main
from dinat.app.image_paths import path_text
from dinat.app.training.recipe import Recipe
from dinat.app.training.spec import TrainingSpec, read_split
from tests.app.conftest import DIGITS

APP = Path(__file__).parents[2] / "app"
EXACT = ["--runtime", "torch", "--precision", "fp32"]

ONLY_IN = {
    "image_paths.py": ("rglob", "walk", "scandir", "glob.glob", "iglob"),
    "tables.py": ("csv.DictReader", "csv.reader"),
    "images.py": ("Image.open", "exif_transpose"),
    "api/forms.py": ("parse_qsl", "MultipartParser"),
    "api/json_limits.py": ("orjson.loads",),
}
"""Calls that only one module may have."""

OTHERS = {
    "cli/result_writers.py": ("csv.reader",),  # its own output
    "engine/runtimes/artifacts.py": ("rglob",),  # the code of this package
    "engine/multiprocess/channel.py": ("orjson.loads",),  # messages between processes
}


def calls(path: Path) -> set[str]:
    """Names of what a module calls, alone and with the name before the dot."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            found |= {node.func.attr, f"{getattr(node.func.value, 'id', '')}.{node.func.attr}"}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.add(node.func.id)
    return found


@pytest.mark.parametrize("path", sorted(APP.rglob("*.py")), ids=lambda path: str(path.relative_to(APP)))
def test_files_images_and_bodies_are_read_in_one_module(path: Path) -> None:
    name = str(path.relative_to(APP))
    elsewhere = {call for module, names in ONLY_IN.items() if module != name for call in names}
    own = set(ONLY_IN.get(name, ())) | set(OTHERS.get(name, ()))
    assert not calls(path) & elsewhere - own


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of two images each, under names and in folders that systems write, beside what is no image."""
    data = tmp_path / "photos [2024]"
    (tmp_path / "linked" / "deep").mkdir(parents=True)
    for name in (
        "3/a.JPE",
        "3/b.jfif",
        "7/caf\udce9.png",
        "7/__MACOSX/._a.png",
        "7/._a.png",
        "__MACOSX/3/c.png",
    ):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(DIGITS / f"{name[0] if name[0].isdigit() else 3}-1.png", data / name)
    shutil.copy(DIGITS / "7-1.png", tmp_path / "linked" / "deep" / "d.png")
    (data / "7" / "more").symlink_to(tmp_path / "linked")
    (tmp_path / "linked" / "loop").symlink_to(data)
    (data / "7" / "notes.txt").write_text("text")
    return data


IMAGES = {"3/a.JPE": "3", "3/b.jfif": "3", "7/caf\\udce9.png": "7", "7/more/deep/d.png": "7"}


def test_every_command_uses_the_same_images(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to, out = tmp_path / "labels.jsonl", tmp_path / "out"
    assert main(["classify", str(folder), "--output", "jsonl", "--to", str(to), *EXACT]) == 0
    lines = map(json.loads, to.read_text().splitlines())
    labels = {row["path"].removeprefix(f"{folder}/"): row["predictions"][0]["label"] for row in lines}
    assert labels == IMAGES

    assert main(["batch", str(folder), str(out), *EXACT]) == 0
    rows = ds.dataset(out, format="parquet").to_table().to_pylist()
    assert {row["path"]: row["labels"][0] for row in rows} == labels

    capsys.readouterr()
    assert main(["evaluate", "digits", str(folder), "--json", *EXACT]) == 0
    evaluated = json.loads(capsys.readouterr().out)["results"][0]
    assert {row["class"]: (row["images"], row["recall"]) for row in evaluated["classes"]} == {"3": (2, 1.0), "7": (2, 1.0)}

    split = read_split(TrainingSpec("digits", None, folder, folder, out, Recipe(), 10**6))
    names = [(path_text(image.path).removeprefix(f"{folder}/"), image.label) for image in split.train]
    assert names == list(IMAGES.items())
