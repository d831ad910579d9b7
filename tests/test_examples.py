"""The notebook runs from its first cell to its last."""

import asyncio
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


@pytest.mark.timeout(240)
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_trains_evaluates_and_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    notebook = nbformat.read(ROOT / "examples" / "finetune.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
    asyncio.run(client.async_execute())
    said = "".join(output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)
    assert "5 from the checkpoint" in said
    assert "Prediction(label='4'" in said
    assert "'stage3': (128, 4, 4)" in said
