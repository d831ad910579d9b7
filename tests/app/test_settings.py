import os
import subprocess
import sys
from pathlib import Path

import pytest

from dinat.app.cli import main
from dinat.app.settings import Settings, misspelt_variables

VARIABLES = [f"DINAT_{name.upper()}" for name in Settings.model_fields]
ALIASES = ["AIP_HTTP_PORT", "SAGEMAKER_BIND_TO_PORT", "AIP_PREDICT_ROUTE", "AIP_HEALTH_ROUTE"]

WITHOUT_HOME = """
import pwd, sys

def unknown(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = unknown
from dinat.app.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""The command line of a user without an entry in passwd, as with `docker run --user 12345`."""


@pytest.mark.parametrize("variable", [*VARIABLES, *ALIASES])
def test_empty_variable_is_as_none(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(variable, raising=False)
    expected = Settings(_env_file=None)
    monkeypatch.setenv(variable, "")
    assert Settings(_env_file=None) == expected


def test_empty_line_of_a_file_is_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = Settings(_env_file=None)
    Path(".env").write_text("".join(f"{variable}=\n" for variable in VARIABLES))
    assert Settings() == expected


def test_file_with_a_byte_order_mark_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(".env").write_bytes("DINAT_MAX_BATCH=3\r\nDINAT_NAME=é\r\n".encode("utf-8-sig"))
    assert (Settings().max_batch, Settings().name) == (3, "é")


def test_file_of_another_encoding_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(".env").write_bytes("DINAT_MAX_BATCH=3\n".encode("utf-16"))
    assert main(["serve"]) == 1
    assert capsys.readouterr().err == "dinat: .env is not UTF-8 (invalid start byte): save it as UTF-8\n"


@pytest.mark.parametrize("flag", ["--host", "--cache-dir", "--api-keys-file", "--model", "--port"])
def test_empty_flag_is_named(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", flag, ""]) == 1
    assert f"DINAT_{flag[2:].replace('-', '_').upper()}=''" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_keys_file_of_an_editor_is_read(encoding: str, tmp_path: Path) -> None:
    from dinat.app.settings import read_keys

    (tmp_path / "keys").write_bytes("# keys\r\nfirst\r\nsecond,third\r\n".encode(encoding))
    assert read_keys(tmp_path / "keys") == ("first", "second", "third")


@pytest.mark.parametrize(
    ("command", "status", "output"),
    [(["info", "digits"], 0, '"source": "digits"'), (["info", "shi-labs/dinat-mini-in1k-224"], 1, "dinat: ")],
)
def test_user_without_a_home(command: list[str], status: int, output: str, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_HOME, *command], capture_output=True, text=True, env=environment)
    assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
    assert output in done.stdout + done.stderr
    (private,) = tmp_path.iterdir()
    assert private.stat().st_mode & 0o777 == 0o700


def test_misspelt_variables_are_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    of_kubernetes = [f"DINAT_{name}" for name in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT_8000_TCP_ADDR")]
    known = dict.fromkeys(("DINAT_MODEL", "dinat_port", "MODLE", *of_kubernetes), "x")
    assert misspelt_variables(known) == {}
    wrong = {"DINAT_MODLE": "x", "DINAT_MAX_BATCHES": "2", "dinat_api_key": "x"}
    assert misspelt_variables(wrong | known) == {
        "DINAT_MODLE": "DINAT_MODEL",
        "DINAT_MAX_BATCHES": "DINAT_MAX_BATCH",
        "dinat_api_key": "DINAT_API_KEYS",
    }
    monkeypatch.setenv("DINAT_MODLE", "x")
    assert main(["classify", "none"]) == 1
    assert "dinat: DINAT_MODLE is not a setting: did you mean DINAT_MODEL?" in capsys.readouterr().err.splitlines()
