"""The notebooks in colab/: short, opened by their own badge, and running from top to bottom on their smoke variant."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
COLAB = "https://colab.research.google.com/github/patch-diffusion/patch-diffusion/blob/main/"


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


def read(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    return notebook


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def errors(notebook: nbformat.NotebookNode) -> list[str]:
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    return [f"{output.ename}: {output.evalue}" for output in outputs if output.output_type == "error"]


def test_the_promised_notebooks_are_there():
    assert {path.stem for path in NOTEBOOKS} >= {"mnist", "patching", "patch_diffusion"}


def test_is_short(path):
    notebook = read(path)
    assert len(notebook.cells) <= 15
    assert path.stat().st_size < 1_000_000


def test_badge_opens_this_file(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown"
    links = re.findall(
        r"\[!\[[^]]*\]\(https://colab\.research\.google\.com/assets/colab-badge\.svg\)\]\((\S+)\)", first.source
    )
    assert links == [COLAB + path.relative_to(ROOT).as_posix()]


def test_stored_outputs_are_those_of_one_run_without_errors(path):
    notebook = read(path)
    counts = [cell.execution_count for cell in code(notebook)]
    if any(cell.outputs for cell in code(notebook)):
        assert counts == list(range(1, len(counts) + 1))
    assert not errors(notebook)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_on_its_smoke_variant(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PATCH_DIFFUSION_SMOKE", "1")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    # This checkout, installed or not: the notebook must find it and install nothing.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("MPLBACKEND", raising=False)

    notebook = read(path)
    for cell in code(notebook):
        cell.outputs, cell.execution_count = [], None
    # Without kernel folders to look in, "python3" is ipykernel's own: the Python that runs this test.
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    assert manager.kernel_spec.argv[0] == sys.executable
    work = tmp_path / "work"
    work.mkdir()
    client = NotebookClient(notebook, timeout=300, km=manager, resources={"metadata": {"path": str(work)}})
    client.execute(cleanup_kc=True)

    assert not errors(notebook)
    assert not list(work.iterdir()), "the notebook left files behind, or installed a copy of the package"
    for cell in code(notebook):
        if "plt.subplots" in cell.source:
            assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source
