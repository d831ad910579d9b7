import os
from collections import Counter
from pathlib import Path

import pytest

from dinat.app.image_paths import describe_skipped, is_image, list_files, path_text, pattern_folder, subfolders


def create(folder: Path, *names: str) -> None:
    for name in names:
        path = Path(os.path.join(folder, name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def names(location: Path | str, folder: Path) -> list[str]:
    return [os.path.relpath(path, folder) for path in list_files(str(location)).images().paths]


def test_folder_is_searched_without_metadata_of_systems(tmp_path: Path) -> None:
    create(tmp_path, "b.png", "a/deep/c.JPG", "a/d.jfif", "e.jpe", "f.HEIC")
    create(
        tmp_path, "._b.png", "a/._d.jfif", "__MACOSX/._b.png", "a/__MACOSX/b.png", ".cache/b.png", "a/@eaDir/b.png/thumb.jpg"
    )
    create(tmp_path, "$RECYCLE.BIN/b.png")
    assert names(tmp_path, tmp_path) == ["a/d.jfif", "a/deep/c.JPG", "b.png", "e.jpe", "f.HEIC"]
    assert names(tmp_path / "*", tmp_path) == ["b.png", "e.jpe", "f.HEIC"]
    assert names(tmp_path / "**" / "*.j*", tmp_path) == ["a/d.jfif", "e.jpe"]
    assert names(tmp_path / "**", tmp_path) == names(tmp_path, tmp_path)
    assert subfolders(str(tmp_path)) == ["a"]


def test_skipped_files_are_counted_by_kind(tmp_path: Path) -> None:
    create(tmp_path, "1.png", "a.txt", "b.TXT", "README")
    (tmp_path / "gone.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    skipped = list_files(str(tmp_path)).images().skipped
    assert skipped == {".txt": 2, "without a suffix": 1, "broken link": 1, "special file": 1}
    assert describe_skipped(skipped).startswith("5 files are skipped: 2 .txt, ")
    assert describe_skipped(Counter()) == ""
    assert describe_skipped(Counter("abcdefg")).endswith("1 e and 2 more kinds")


def test_links_are_followed_and_loops_are_seen(tmp_path: Path) -> None:
    create(tmp_path / "elsewhere", "1.png")
    create(tmp_path / "data", "2.png")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path)
    assert names(tmp_path / "data", tmp_path / "data") == ["2.png", "linked/1.png"]
    assert "linked/1.png" in names(tmp_path / "data" / "**" / "*.png", tmp_path / "data")


@pytest.mark.parametrize("name", ["photos [2024]", "what?", "a*b", "[x"])
def test_exact_name_is_used_before_a_pattern(name: str, tmp_path: Path) -> None:
    create(tmp_path, f"{name}/1.png", "photos 2/2.png", "whaty/2.png", "axb/2.png", "what?.png", "whaty.png")
    assert names(tmp_path / name, tmp_path) == [f"{name}/1.png"]
    assert names(tmp_path / name / "*.png", tmp_path) == [f"{name}/1.png"]
    assert names(tmp_path / "what?.png", tmp_path) == ["what?.png"]
    assert pattern_folder(str(tmp_path / name / "*.png")) == str(tmp_path / name)


def test_pattern_in_a_folder(tmp_path: Path) -> None:
    create(tmp_path, "2023/1.png", "2024/2.png", "2024/x/3.png")
    assert names(tmp_path / "202[34]" / "*.png", tmp_path) == ["2023/1.png", "2024/2.png"]
    assert pattern_folder(str(tmp_path / "202?" / "*.png")) == str(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"\*\.jpg does not exist"):
        list_files(str(tmp_path / "*.jpg"))


def test_relative_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create(tmp_path, "1.png", "a/2.png")
    monkeypatch.chdir(tmp_path)
    assert list_files("*.png").paths == ["1.png"]
    assert list_files("**/*.png").images().paths == ["./1.png", "./a/2.png"]


def test_name_that_is_not_utf8(tmp_path: Path) -> None:
    create(tmp_path, os.fsdecode(b"caf\xe9.png"))
    (path,) = list_files(str(tmp_path)).images().paths
    assert os.fsencode(path).endswith(b"/caf\xe9.png")
    assert path_text(path) == f"{tmp_path}/caf\\udce9.png"
    assert path_text("é.png") == "é.png"


@pytest.mark.parametrize("name", ["1.jpe", "1.JFIF", "1.Dib", "1.hif", "1.apng", "1.TIFF"])
def test_suffixes_in_any_case(name: str) -> None:
    assert is_image(name)
    assert not is_image(f"{name}.txt")


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("pipe", "pipe is a special file, not a file or folder"),
        ("link", "link is a broken link, not a file or folder"),
        ("https://x.org/a.png", "https://x.org/a.png is a URL: use paths of files; dinat batch reads s3://"),
        ("", "an empty path does not exist"),
        ("no/*.png", r"no/\*.png does not exist"),
    ],
)
def test_location_without_a_file_is_described(
    location: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("link").symlink_to("missing")
    with pytest.raises(FileNotFoundError, match=message):
        list_files(location)
