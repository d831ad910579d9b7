import asyncio
import gzip
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dinat.app.batch.sources import open_source
from dinat.app.cli import main
from dinat.model.checkpoints.files import EMBEDDED
from tests.app.conftest import DIGITS
from tests.app.sample_images import encoded

IMAGES = sorted(DIGITS.glob("*.png"))
EXACT = ["--runtime", "torch", "--precision", "fp32"]


def rows(folder: Path) -> list[dict[str, Any]]:
    """Read the folder as any Parquet reader does."""
    table = ds.dataset(folder, format="parquet").to_table()
    sorted_rows: list[dict[str, Any]] = table.sort_by("path").to_pylist()
    return sorted_rows


def top_labels(results: list[dict[str, Any]]) -> dict[str, str]:
    return {Path(row["path"]).name: row["labels"][0] for row in results}


def write_tar(path: Path, images: list[Path]) -> None:
    """Write a WebDataset tar file: each image with a JSON file."""
    with tarfile.open(path, "w") as tar:
        for image in images:
            tar.add(image, image.name)
            text = json.dumps({"from": image.name}).encode()
            info = tarfile.TarInfo(f"{image.stem}.json")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))


@pytest.fixture(scope="module")
def classify_predictions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Predictions of `dinat classify`, by file name."""
    to = tmp_path_factory.mktemp("classify") / "labels.jsonl"
    assert main(["classify", str(DIGITS), "--output", "jsonl", "--to", str(to), *EXACT]) == 0
    results = map(json.loads, to.read_text().splitlines())
    return {Path(result["path"]).name: result["predictions"] for result in results}


def test_results_match_classify(
    tmp_path: Path, classify_predictions: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["batch", str(DIGITS), str(tmp_path / "out"), "--shard", "7", *EXACT]) == 0
    found = rows(tmp_path / "out")
    assert [row["path"] for row in found] == [path.name for path in IMAGES]
    for row in found:
        expected = classify_predictions[row["path"]]
        assert row["labels"] == [prediction["label"] for prediction in expected]
        assert row["class_ids"] == [prediction["class_id"] for prediction in expected]
        assert np.allclose(row["scores"], [prediction["score"] for prediction in expected], atol=1e-5)
        assert row["error"] is None
    assert f"{len(IMAGES)} images in 3 of 3 shards; 0 rows have an error" in capsys.readouterr().err


def test_webdataset_tar_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "a-000.tar", IMAGES[:9])
    write_tar(tmp_path / "in" / "a-001.tar", IMAGES[9:])
    (tmp_path / "in" / "size.txt").write_text("2")
    assert main(["batch", str(tmp_path / "in" / "a-*.tar"), str(tmp_path / "out"), *EXACT]) == 0
    found = rows(tmp_path / "out")
    assert [row["path"] for row in found] == [f"a-000.tar/{path.name}" for path in IMAGES[:9]] + [
        f"a-001.tar/{path.name}" for path in IMAGES[9:]
    ]
    assert top_labels(found) == {path.name: path.name[0] for path in IMAGES}


@pytest.mark.parametrize("compression", ["bz2", "xz"])
def test_tar_files_of_other_compressions(compression: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / f"x.tar.{compression}", f"w:{compression}") as tar:  # type: ignore[call-overload]
        tar.add(IMAGES[0], "a.png")
    source = open_source(str(tmp_path / f"x.tar.{compression}"))
    (shard,) = source.shards(10)
    assert [item.data for item in source.items(shard)] == [IMAGES[0].read_bytes()]


def test_links_in_a_tar_are_rows_with_an_error(tmp_path: Path) -> None:
    """tar stores the second hard link to a file without its data."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(IMAGES[0], "a.png")
        for name, kind in (("b.png", tarfile.LNKTYPE), ("c.png", tarfile.SYMTYPE), ("d.txt", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "a.png"
            tar.addfile(link)
    assert main(["batch", str(tmp_path / "x.tar"), str(tmp_path / "out"), *EXACT]) == 0
    reason = "there is no image: the member is a link to a.png"
    assert [(row["path"], row["error"]) for row in rows(tmp_path / "out")] == [
        ("x.tar/a.png", None),
        ("x.tar/b.png", reason),
        ("x.tar/c.png", reason),
    ]


def test_path_without_bytes_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hugging Face's datasets store paths unless the images are embedded."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = [{"bytes": IMAGES[0].read_bytes(), "path": None}, {"bytes": None, "path": "/data/1.png"}]
    pq.write_table(pa.table({"image": pa.array(values, image)}), tmp_path / "x.parquet")
    assert main(["batch", str(tmp_path / "x.parquet"), str(tmp_path / "out"), *EXACT]) == 0
    reason = "there is no image: the value has only the path /data/1.png, no bytes"
    assert [row["error"] for row in rows(tmp_path / "out")] == [None, reason]
    pq.write_table(pa.table({"image": ["/data/1.png"], "id": [1]}), tmp_path / "paths.parquet")
    capsys.readouterr()
    expected = "no column holds encoded images, as binary or a struct with bytes: its columns are image (string), id (int64)"
    assert expected in error_of([str(tmp_path / "paths.parquet"), str(tmp_path / "other")], capsys)


LAYOUTS = {
    "large_binary": pa.large_binary(),
    "fixed_size_binary": pa.binary(300),
    "dictionary": pa.dictionary(pa.int8(), pa.binary()),
    **({"binary_view": pa.binary_view()} if hasattr(pa, "binary_view") else {}),
    "struct": pa.struct([("bytes", pa.large_binary()), ("path", pa.string())]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_of_every_arrow_layout_are_images(layout: str, tmp_path: Path) -> None:
    size = 300 if layout == "fixed_size_binary" else None  # BMP ignores the bytes after its pixels
    image = Image.open(IMAGES[0]).convert("1").resize((32, 32))
    data = [encoded(image, "BMP").ljust(size or 0, b"\0"), None]
    values = [None if content is None else {"bytes": content, "path": "x"} for content in data] if layout == "struct" else data
    column = pa.array(values, LAYOUTS[layout]) if layout != "dictionary" else pa.array(values, pa.binary()).dictionary_encode()
    table = pa.table({"label": [1, 2], "image": column})
    assert table.schema.field("image").type == LAYOUTS[layout] or layout == "dictionary"
    pq.write_table(table, tmp_path / "images.parquet")
    source = open_source(str(tmp_path / "images.parquet"))
    (shard,) = source.shards(10)
    assert [item.data for item in source.items(shard)] == data


def test_names_with_brackets_and_of_any_encoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "photos [2024]"
    folder.mkdir()
    name = os.fsdecode(b"shard[1] caf\xe9.tar")
    with tarfile.open(folder / name, "w") as tar:
        for member in (
            "a.png",
            "./._a.png",
            "__MACOSX/._a.png",
            "x/.hidden/a.png",
            "b.JFIF",
            os.fsdecode(b"\xe9.png"),
            "c.txt",
        ):
            tar.add(IMAGES[0], member)
    (folder / "._shard.tar").write_bytes(b"AppleDouble")
    (folder / "notes.txt").write_text("text")
    expected = sorted(f"shard[1] caf\\udce9.tar/{member}" for member in ("a.png", "b.JFIF", "\\udce9.png"))
    for number, source in enumerate((folder, folder / name, folder / "*.tar", folder / "shard*")):
        assert main(["batch", str(source), str(tmp_path / f"out{number}"), *EXACT]) == 0
        found = rows(tmp_path / f"out{number}")
        assert [(row["path"], row["error"]) for row in found] == [(path, None) for path in expected]
    assert "1 file is skipped: 1 .txt" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["binary", "struct"])
def test_parquet_rows_and_copied_columns(kind: str, tmp_path: Path) -> None:
    data = [path.read_bytes() for path in IMAGES]
    image = data if kind == "binary" else [{"bytes": encoded, "path": "x.png"} for encoded in data]
    table = pa.table({"id": range(len(data)), "image": image, "url": [path.name for path in IMAGES]})
    source = tmp_path / "images.parquet"
    pq.write_table(table, source, row_group_size=4)
    assert main(["batch", str(source), str(tmp_path / "out"), "--shard", "8", "--keep", "id,url", "--top-k", "1", *EXACT]) == 0
    found = rows(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) == -(-len(data) // 8)
    assert sorted(row["id"] for row in found) == list(range(len(data)))
    for row in found:
        assert row["path"] == f"images.parquet/{row['id']}"
        assert row["labels"] == [row["url"][0]]


def test_feature_maps_and_unreadable_images(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    shutil.copy(IMAGES[0], source / "good.png")
    (source / "bad.png").write_bytes(b"text")
    (source / "gone.png").symlink_to(tmp_path / "nowhere.png")
    flags = ["--features", "pooled,stage2,hidden_states", "--feature-dtype", "float16"]
    assert main(["batch", str(source), str(tmp_path / "out"), *flags, *EXACT]) == 0
    bad, good = rows(tmp_path / "out")
    assert (bad["path"], bad["labels"], bad["stage2"]) == ("bad.png", None, None)
    assert bad["error"].startswith("the image is text: supported formats are JPEG")
    assert main(["classify", str(source / "good.png"), "--features", "stage2", "--maps", str(tmp_path / "maps"), *EXACT]) == 0
    (file,) = (tmp_path / "maps").rglob("*.npz")
    assert good["stage2"]["shape"] == [64, 8, 8]
    assert np.allclose(np.reshape(good["stage2"]["values"], (64, 8, 8)), np.load(file)["stage2"], atol=2e-3)
    assert {name for name in good if name.startswith("hidden_states")} == {f"hidden_states.{n}" for n in range(4)}
    assert good["pooled"]["shape"] == [128]


def test_damaged_tar_keeps_what_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("a.tar", "b.tar"):
        write_tar(source / name, IMAGES[:5])
    whole_file = (source / "a.tar").read_bytes()
    (source / "a.tar").write_bytes(whole_file[: len(whole_file) // 2 + 100])  # within a block of 512 bytes
    (source / "c.tar.gz").write_bytes(gzip.compress(random.Random(0).randbytes(10_000))[:5000])
    (source / "empty.tar").touch()
    assert main(["batch", str(source), str(out), *EXACT]) == 1
    log = capsys.readouterr().err
    for number, name in ((2, "c.tar.gz"), (3, "empty.tar")):
        assert f"dinat: shard {number} ({source / name}): {source / name} is not a complete tar file" in log
    assert {path.name[:11] for path in out.iterdir()} == {"_batch.json", "part-000000", "part-000001"}  # no temporary files
    (error,) = [row for row in rows(out) if row["error"]]
    assert error["path"] == "a.tar"
    assert error["error"].startswith(f"{source / 'a.tar'} is not a complete tar file: unexpected end of data")
    readable, whole = ([row["labels"] for row in rows(out) if row["path"].startswith(f"{name}.tar/")] for name in "ab")
    assert 0 < len(readable) < len(whole) == 5
    assert readable == whole[: len(readable)]
    for name in ("a.tar", "c.tar.gz", "empty.tar"):
        write_tar(source / name, IMAGES[:5])
    assert main(["batch", str(source), str(out), "--replace", *EXACT]) == 0
    assert "15 images in 3 of 4 shards, 1 done before" in capsys.readouterr().err
    assert len(rows(out)) == 20


def test_results_inside_the_source_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(DIGITS / "7-1.png", tmp_path)
    for dest in (tmp_path / "results", tmp_path / "a" / ".." / "results", tmp_path):
        assert "is inside" in error_of([str(tmp_path), str(dest)], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["7-1.png"]


def test_damaged_parquet_fails_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    table = pa.table({"image": [path.read_bytes() for path in IMAGES[:3]], "id": [1, 2, 3]})
    for name in ("b", "c"):
        pq.write_table(table, source / f"{name}.parquet")
    (source / "a.parquet").touch()
    (source / "b.parquet").write_bytes((source / "c.parquet").read_bytes()[:-100])
    pq.write_table(pa.table({"other": [1]}), source / "d.parquet")
    assert main(["batch", str(source), str(out), "--column", "image", "--keep", "id", *EXACT]) == 1
    log = capsys.readouterr().err
    for number, name in ((0, "a"), (1, "b")):
        file = source / f"{name}.parquet"
        assert f"shard {number} ({file}): {file} is not a Parquet file" in log
    assert f"shard 3 ({source / 'd.parquet'}): {source / 'd.parquet'} has no column image, id" in log
    assert [row["id"] for row in rows(out)] == [1, 2, 3]
    assert {path.name[:11] for path in out.iterdir()} == {"_batch.json", "part-000002"}


@pytest.mark.slow
def test_every_image_is_classified_once_after_three_kills(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for n in range(600):
        shutil.copy(IMAGES[n % len(IMAGES)], source / f"{n:03}.png")
    command = [sys.executable, "-m", "dinat", "batch", str(source), str(out), "--shard", "20", *EXACT]
    rng = random.Random(18)
    for _ in range(3):
        before = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
        running = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        num_parts = len(before) + rng.randint(1, 5)
        deadline = time.monotonic() + 60
        while len(list(out.glob("part-*"))) < num_parts and running.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        running.kill()
        running.wait()
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert 3 <= len(done) < 30
    assert subprocess.run(command, timeout=100, check=True, capture_output=True, text=True).stderr.endswith("have an error\n")
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done  # not computed twice
    found = rows(out)
    assert [row["path"] for row in found] == [f"{n:03}.png" for n in range(600)]
    assert all(row["labels"][0] == IMAGES[n % len(IMAGES)].name[0] for n, row in enumerate(found))
    assert not [path for path in out.iterdir() if path.name.startswith(".unfinished")]


def test_ctrl_c_says_how_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    async def run_shards(*arguments: Any) -> AsyncIterator[None]:
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(60)  # is cancelled
        yield

    monkeypatch.setattr("dinat.app.batch.run.run_shards", run_shards)
    assert main(["batch", str(DIGITS), str(tmp_path / "labels")]) == 130
    assert capsys.readouterr().err == "dinat: interrupted: run the same command again to resume\n"


def test_fsspec_url() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in IMAGES[:4]:
        memory.pipe(f"/in/{path.name}", path.read_bytes())
    assert main(["batch", "memory://in", "memory://out", *EXACT]) == 0
    (part,) = memory.glob("/out/part-*.parquet")
    found = pq.read_table(io.BytesIO(memory.cat(part))).to_pylist()
    assert {row["path"]: row["labels"][0] for row in found} == {path.name: path.name[0] for path in IMAGES[:4]}


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run and return the error message, which is one line."""
    assert main(["batch", *arguments, *EXACT]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_invalid_sources_and_flags_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, empty, mixed = tmp_path / "out", tmp_path / "empty", tmp_path / "mixed"
    empty.mkdir()
    mixed.mkdir()
    shutil.copy(IMAGES[0], mixed)
    write_tar(mixed / "a.tar", IMAGES[:2])
    assert f"{empty} does not exist or is empty" in error_of([str(empty), str(out)], capsys)
    assert "select one kind by a pattern" in error_of([str(mixed), str(out)], capsys)
    assert "--column and --keep require Parquet files" in error_of([str(DIGITS), str(out), "--keep", "id"], capsys)
    assert "top_k must be between 1 and 10, got 11" in error_of([str(DIGITS), str(out), "--top-k", "11"], capsys)
    assert "nowhere" in error_of(["nowhere://bucket/in", str(out)], capsys)
    pq.write_table(pa.table({"a": [b""], "b": [b""], "c": [1]}), tmp_path / "two.parquet")
    two = str(tmp_path / "two.parquet")
    assert "the image column cannot be detected: set --column to one of a, b" in error_of([two, str(out)], capsys)
    assert "the column c holds int64" in error_of([two, str(out), "--column", "c"], capsys)
    assert "has no column d" in error_of([two, str(out), "--column", "a", "--keep", "d"], capsys)
    pq.write_table(pa.table({"image": [b""], "path": ["a"]}), tmp_path / "path.parquet")
    arguments = [str(tmp_path / "path.parquet"), str(out), "--keep", "path"]
    assert "--keep path: the results already have" in error_of(arguments, capsys)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    assert "bad.parquet is not a Parquet file" in error_of([str(tmp_path / "bad.parquet"), str(out)], capsys)
    assert "is not empty, it contains 0-1.png" in error_of([str(DIGITS), str(mixed)], capsys)


def test_results_of_another_batch_are_preserved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    shutil.copy(IMAGES[0], source)
    assert main(["batch", str(source), str(out), *EXACT]) == 0
    capsys.readouterr()
    assert "top_k was None, is 1" in error_of([str(source), str(out), "--top-k", "1"], capsys)
    assert "shard was 1000, is 10" in error_of([str(source), str(out), "--shard", "10"], capsys)
    assert [row["path"] for row in rows(out)] == [IMAGES[0].name]


def test_results_of_changed_files_are_recomputed_with_replace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for n in range(5):
        shutil.copy(IMAGES[n], source / f"{n}.png")
    arguments = [str(source), str(out), "--shard", "2"]
    assert main(["batch", *arguments, *EXACT]) == 0
    before = {path.name for path in out.glob("part-*")}
    shutil.copy(IMAGES[-1], source / "3.png")
    shutil.copy(IMAGES[-1], source / "5.png")
    capsys.readouterr()
    assert "has 2 results, of 3, for files that have changed" in error_of(arguments, capsys)
    assert main(["batch", *arguments, "--replace", *EXACT]) == 0
    assert "4 images in 2 of 3 shards, 1 done before" in capsys.readouterr().err
    assert len(before & {path.name for path in out.glob("part-*")}) == 1
    assert [row["labels"][0] for row in rows(out)] == [IMAGES[n].name[0] for n in (0, 1, 2, -1, 4, -1)]


def test_two_workers_on_ray_give_the_same_rows(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    assert main(["batch", str(DIGITS), str(tmp_path / "one"), "--shard", "3", *EXACT]) == 0
    command = [sys.executable, "-m", "dinat", "batch", str(DIGITS), str(tmp_path / "two"), "--shard", "3", "--workers", "2"]
    done = subprocess.run(
        [*command, *EXACT], timeout=110, capture_output=True, text=True, env={**os.environ, "RAY_DEDUP_LOGS": "0"}
    )
    assert done.returncode == 0, done.stderr
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["path"] for row in two] == [row["path"] for row in one]
    assert [row["labels"][0] for row in two] == [row["labels"][0] for row in one]
    assert np.allclose([row["scores"] for row in two], [row["scores"] for row in one], atol=1e-5)


@pytest.mark.slow
def test_engine_failure_on_ray_ends_with_one_line(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(EMBEDDED["digits"] / name, model)
    save_file({"classifier.bias": torch.zeros(10)}, model / "model.safetensors")
    flags = ["--model", str(model), "--workers", "2"]
    command = [sys.executable, "-m", "dinat", "batch", str(DIGITS), str(tmp_path / "out"), *flags]
    done = subprocess.run(command, timeout=110, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("dinat: a worker on Ray failed: ")
    assert f"the weights of {model} do not match their configuration" in last
