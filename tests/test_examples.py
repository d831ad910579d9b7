"""The notebook in examples/ runs."""

import asyncio
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


@pytest.mark.timeout(240)
@pytest.mark.filterwarnings("ignore")
def test_notebook_trains_evaluates_and_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    notebook = nbformat.read(ROOT / "examples" / "finetune.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
    asyncio.run(client.async_execute())
    text = "".join(output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)
    assert "5 of them known to the checkpoint" in text
    assert "Prediction(label='4'" in text
    assert "'stage3': (128, 4, 4)" in text
