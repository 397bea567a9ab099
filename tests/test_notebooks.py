"""The notebooks run from scratch, and are committed with their outputs, small and clean."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.util import run_sync

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    notebook = nbformat.read(path, as_version=4)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"]


def images(cells):
    return sum(
        any(kind.startswith("image/") for kind in output.get("data", {}))
        for cell in cells
        for output in cell.outputs
    )


def noise(cells):
    """Return what a reader should not see: errors, warnings and logs."""
    return [
        output
        for cell in cells
        for output in cell.outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]


def text(cells):
    """Return the sources, and all outputs but the pictures."""
    shown = [cell.source for cell in cells]
    for output in [output for cell in cells for output in cell.outputs]:
        shown.append(output.get("text", ""))
        shown += [v for k, v in output.get("data", {}).items() if k.startswith("text/")]
    return "\n".join(shown)


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 4


@EACH
def test_committed_as_executed(path):
    notebook, cells = read(path)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert images(cells) >= 1
    assert noise(cells) == []
    # Without the lines that TensorFlow logs, as the test that runs it would not see.
    assert "import_tensorflow()" in cells[0].source.partition("\nimport mdn\n")[0]
    assert not re.search(r"/(tmp|home|root|Users|work|usr|opt|var)/", text(cells))
    assert notebook.metadata.kernelspec == {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }


@EACH
def test_small(path):
    assert path.stat().st_size < 500_000
    _, cells = read(path)
    assert max(len(cell.source.splitlines()) for cell in cells) <= 25


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One for all notebooks, as the import of TensorFlow takes longer than some of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MDN_NOTEBOOK_EPOCHS", "2")
        settings = tmp_path_factory.mktemp("ipython")
        patch.setenv("IPYTHONDIR", str(settings))  # nobody's own settings
        patch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)  # the notebook sees to that
        client = NotebookClient(nbformat.v4.new_notebook(), kernel_name="python3")
        manager = client.create_kernel_manager()
        yield manager

        async def end():
            await manager.shutdown_kernel(now=True)

        run_sync(end)()


@pytest.mark.slow
@pytest.mark.xdist_group("notebooks")
@EACH
def test_runs(path, tmp_path, kernel):
    notebook, committed = read(path)
    expected = images(committed)
    for cell in committed:
        cell.outputs = []
    fresh = f"%reset -f\n%cd -q {tmp_path}"  # without any names, where there are no files
    notebook.cells.insert(0, nbformat.v4.new_code_cell(fresh))
    NotebookClient(notebook, km=kernel, timeout=600).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert images(cells) == expected >= 1
    assert noise(cells) == []
    assert list(tmp_path.iterdir()) == []  # nothing is left behind
