import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from dinat.app.cli import main
from dinat.model.checkpoints.files import EMBEDDED
from tests.app.conftest import DIGITS

PICTURES = sorted(DIGITS.glob("*.png"))
EXACT = ["--runtime", "torch", "--precision", "fp32"]


def rows(folder: Path) -> list[dict[str, Any]]:
    """As any reader of Parquet sees the folder."""
    table = ds.dataset(folder, format="parquet").to_table()
    found: list[dict[str, Any]] = table.sort_by("path").to_pylist()
    return found


def best(found: list[dict[str, Any]]) -> dict[str, str]:
    return {Path(row["path"]).name: row["labels"][0] for row in found}


def tar_of(path: Path, pictures: list[Path]) -> None:
    with tarfile.open(path, "w") as tar:
        for picture in pictures:
            tar.add(picture, picture.name)
            text = json.dumps({"from": picture.name}).encode()
            about = tarfile.TarInfo(f"{picture.stem}.json")
            about.size = len(text)
            tar.addfile(about, io.BytesIO(text))


@pytest.fixture(scope="module")
def by_classify(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    to = tmp_path_factory.mktemp("classify") / "labels.jsonl"
    assert main(["classify", str(DIGITS), "--output", "jsonl", "--to", str(to), *EXACT]) == 0
    said = map(json.loads, to.read_text().splitlines())
    return {Path(one["path"]).name: one["predictions"] for one in said}


def test_a_folder_gives_what_classify_gives(
    tmp_path: Path, by_classify: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["batch", str(DIGITS), str(tmp_path / "out"), "--shard", "7", *EXACT]) == 0
    found = rows(tmp_path / "out")
    assert [row["path"] for row in found] == [path.name for path in PICTURES]
    for row in found:
        said = by_classify[row["path"]]
        assert (row["labels"], row["class_ids"]) == ([one["label"] for one in said], [one["class_id"] for one in said])
        assert np.allclose(row["scores"], [one["score"] for one in said], atol=1e-5)
        assert row["error"] is None
    assert f"{len(PICTURES)} pictures in 3 of 3 shards; 0 rows have an error" in capsys.readouterr().err


def test_tar_files_of_webdataset(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    tar_of(tmp_path / "in" / "a-000.tar", PICTURES[:9])
    tar_of(tmp_path / "in" / "a-001.tar", PICTURES[9:])
    (tmp_path / "in" / "size.txt").write_text("2")
    assert main(["batch", str(tmp_path / "in" / "a-*.tar"), str(tmp_path / "out"), *EXACT]) == 0
    found = rows(tmp_path / "out")
    assert [row["path"] for row in found] == [f"a-000.tar/{path.name}" for path in PICTURES[:9]] + [
        f"a-001.tar/{path.name}" for path in PICTURES[9:]
    ]
    assert best(found) == {path.name: path.name[0] for path in PICTURES}


@pytest.mark.parametrize("kind", ["binary", "struct"])
def test_rows_of_parquet_and_columns_taken_over(kind: str, tmp_path: Path) -> None:
    data = [path.read_bytes() for path in PICTURES]
    image = data if kind == "binary" else [{"bytes": one, "path": "x.png"} for one in data]
    table = pa.table({"id": range(len(data)), "image": image, "url": [path.name for path in PICTURES]})
    source = tmp_path / "pictures.parquet"
    pq.write_table(table, source, row_group_size=4)
    assert main(["batch", str(source), str(tmp_path / "out"), "--shard", "8", "--keep", "id,url", "--top-k", "1", *EXACT]) == 0
    found = rows(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) == -(-len(data) // 8)
    assert sorted(row["id"] for row in found) == list(range(len(data)))
    for row in found:
        assert row["path"] == f"pictures.parquet/{row['id']}"
        assert row["labels"] == [row["url"][0]]


def test_maps_and_pictures_that_cannot_be_read(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    shutil.copy(PICTURES[0], source / "good.png")
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


def test_a_damaged_tar_fails_alone_and_is_computed_when_it_is_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    tar_of(source / "a.tar", PICTURES[:5])
    tar_of(source / "b.tar", PICTURES[5:9])
    whole = (source / "a.tar").read_bytes()
    (source / "a.tar").write_bytes(whole[: len(whole) // 3])
    assert main(["batch", str(source), str(out), *EXACT]) == 1
    assert f"dinat: shard 0 ({source / 'a.tar'}): {source / 'a.tar'} is no whole tar file" in capsys.readouterr().err
    (there,) = out.glob("part-*")
    assert there.name.startswith("part-000001-")
    (source / "a.tar").write_bytes(whole)
    assert main(["batch", str(source), str(out), *EXACT]) == 0
    assert "5 pictures in 1 of 2 shards; 1 were there already" in capsys.readouterr().err
    assert len(rows(out)) == 9


def test_killed_three_times_it_ends_with_every_picture_once(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for n in range(600):
        shutil.copy(PICTURES[n % len(PICTURES)], source / f"{n:03}.png")
    words = [sys.executable, "-m", "dinat", "batch", str(source), str(out), "--shard", "20", *EXACT]
    chance = random.Random(18)
    for _ in range(3):
        before = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
        running = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        more = len(before) + chance.randint(1, 5)
        until = time.monotonic() + 60
        while len(list(out.glob("part-*"))) < more and running.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.005)
        running.kill()
        running.wait()
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert 3 <= len(done) < 30
    assert subprocess.run(words, timeout=100, check=True, capture_output=True, text=True).stderr.endswith("have an error\n")
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done  # not computed twice
    found = rows(out)
    assert [row["path"] for row in found] == [f"{n:03}.png" for n in range(600)]
    assert all(row["labels"][0] == PICTURES[n % len(PICTURES)].name[0] for n, row in enumerate(found))
    assert not [path for path in out.iterdir() if path.name.startswith(".unfinished")]


def test_any_place_that_fsspec_knows(by_classify: dict[str, Any]) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in PICTURES[:4]:
        memory.pipe(f"/in/{path.name}", path.read_bytes())
    assert main(["batch", "memory://in", "memory://out", *EXACT]) == 0
    (part,) = memory.glob("/out/part-*.parquet")
    found = pq.read_table(io.BytesIO(memory.cat(part))).to_pylist()
    assert {row["path"]: row["labels"][0] for row in found} == {path.name: path.name[0] for path in PICTURES[:4]}


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["batch", *words, *EXACT]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_what_cannot_be_done_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, empty, mixed = tmp_path / "out", tmp_path / "empty", tmp_path / "mixed"
    empty.mkdir()
    mixed.mkdir()
    shutil.copy(PICTURES[0], mixed)
    tar_of(mixed / "a.tar", PICTURES[:2])
    assert f"{empty} is not there, or is empty" in refused([str(empty), str(out)], capsys)
    assert "say which by a pattern" in refused([str(mixed), str(out)], capsys)
    assert "--column and --keep are for Parquet" in refused([str(DIGITS), str(out), "--keep", "id"], capsys)
    assert "top_k must be between 1 and 10, got 11" in refused([str(DIGITS), str(out), "--top-k", "11"], capsys)
    assert "nowhere" in refused(["nowhere://bucket/in", str(out)], capsys)
    pq.write_table(pa.table({"a": [b""], "b": [b""], "c": [1]}), tmp_path / "two.parquet")
    two = str(tmp_path / "two.parquet")
    assert "which column has the pictures? Say it by --column; there are a, b, c" in refused([two, str(out)], capsys)
    assert "the column c holds int64" in refused([two, str(out), "--column", "c"], capsys)
    assert "has no column d" in refused([two, str(out), "--column", "a", "--keep", "d"], capsys)
    pq.write_table(pa.table({"image": [b""], "path": ["a"]}), tmp_path / "path.parquet")
    assert "--keep path: the results have" in refused([str(tmp_path / "path.parquet"), str(out), "--keep", "path"], capsys)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    assert "bad.parquet is no Parquet file" in refused([str(tmp_path / "bad.parquet"), str(out)], capsys)
    assert "is not empty, 0-1.png is in it" in refused([str(DIGITS), str(mixed)], capsys)


def test_results_of_another_batch_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    shutil.copy(PICTURES[0], source)
    assert main(["batch", str(source), str(out), *EXACT]) == 0
    capsys.readouterr()
    assert "top_k was None, is 1" in refused([str(source), str(out), "--top-k", "1"], capsys)
    assert "shard was 1000, is 10" in refused([str(source), str(out), "--shard", "10"], capsys)
    assert [row["path"] for row in rows(out)] == [PICTURES[0].name]


def test_what_comes_of_changed_files_is_computed_anew_if_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for n in range(5):
        shutil.copy(PICTURES[n], source / f"{n}.png")
    words = [str(source), str(out), "--shard", "2"]
    assert main(["batch", *words, *EXACT]) == 0
    before = {path.name for path in out.glob("part-*")}
    shutil.copy(PICTURES[-1], source / "3.png")
    shutil.copy(PICTURES[-1], source / "5.png")
    capsys.readouterr()
    assert "2 of 3 results in" in refused(words, capsys)
    assert main(["batch", *words, "--replace", *EXACT]) == 0
    assert "4 pictures in 2 of 3 shards; 1 were there already" in capsys.readouterr().err
    assert len(before & {path.name for path in out.glob("part-*")}) == 1
    assert [row["labels"][0] for row in rows(out)] == [PICTURES[n].name[0] for n in (0, 1, 2, -1, 4, -1)]


def test_on_ray_two_workers_give_the_same_rows(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    assert main(["batch", str(DIGITS), str(tmp_path / "one"), "--shard", "3", *EXACT]) == 0
    words = [sys.executable, "-m", "dinat", "batch", str(DIGITS), str(tmp_path / "two"), "--shard", "3", "--workers", "2"]
    done = subprocess.run(
        [*words, *EXACT], timeout=110, capture_output=True, text=True, env={**os.environ, "RAY_DEDUP_LOGS": "0"}
    )
    assert done.returncode == 0, done.stderr
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["path"] for row in two] == [row["path"] for row in one]
    assert [row["labels"][0] for row in two] == [row["labels"][0] for row in one]
    assert np.allclose([row["scores"] for row in two], [row["scores"] for row in one], atol=1e-5)


def test_an_engine_that_does_not_start_on_ray_is_one_line_at_the_end(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(EMBEDDED["digits"] / name, model)
    save_file({"classifier.bias": torch.zeros(10)}, model / "model.safetensors")
    words = [
        sys.executable,
        "-m",
        "dinat.app.cli",
        "batch",
        str(DIGITS),
        str(tmp_path / "out"),
        "--model",
        str(model),
        "--workers",
        "2",
    ]
    done = subprocess.run(words, timeout=110, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("dinat: a worker on Ray: ") and f"the weights of {model} do not match their configuration" in last
