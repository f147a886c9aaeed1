"""What a notebook shows: cells run in a real kernel, and their outputs as a front end has them."""

import pytest
import torch

import gradstat

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

MODEL = """
import time, torch, gradstat
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
def train(w, steps, seconds=0.0):
    for _ in range(steps):
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        w.log(loss=loss)
        time.sleep(seconds)
"""


class Followed(nbclient.NotebookClient):
    """Keeps what the front end shows at each change."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        self.shown: list[str] = []

    def process_message(self, msg, cell, cell_index):  # type: ignore[no-untyped-def]
        data = msg["content"].get("data", {})
        if "text/html" in data:
            self.shown.append(data["text/html"])
        return super().process_message(msg, cell, cell_index)


def run(*cells: str) -> tuple[list[str], list[list[dict]]]:
    """All that is shown, and at the end the outputs of each cell after the first."""
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in (MODEL, *cells)]
    )
    client = Followed(notebook, timeout=120)
    client.execute()
    return client.shown, [cell.outputs for cell in notebook.cells[1:]]


def test_live_is_drawn_anew_in_its_own_place() -> None:
    # Each step waits until the view is drawn anew.
    shown, (outputs,) = run(
        """
from IPython.display import DisplayHandle
update, drawn = DisplayHandle.update, []
DisplayHandle.update = lambda *given: (update(*given), drawn.append(given))
w = gradstat.watch(model)
w.live(every_s=0.2)
end_s = time.monotonic() + 60
for step in range(4):
    train(w, 1)
    while len(drawn) <= step and time.monotonic() < end_s:
        time.sleep(0.01)
w.close()
"""
    )
    assert "0 records" in shown[0]
    assert len(set(shown)) == 6  # at its beginning, after each step and at its end
    assert "Watch, open" in shown[-2]
    # One output, which holds the end of the run.
    (output,) = outputs
    assert "4 records of 2 layers, steps 0 to 3" in output["data"]["text/html"]
    assert "Watch, closed" in output["data"]["text/html"]
    assert "loss, " in output["data"]["text/html"]


def test_live_goes_on_in_later_cells_and_ends_with_the_watch() -> None:
    _, (first, second, third) = run(
        "w = gradstat.watch(model, name='main')\nw.live(every_s=0.2)",
        "train(w, 5)\ntime.sleep(1)",
        "w = gradstat.watch(model, name='main')\ntime.sleep(1)\n"
        "import threading\n[each.name for each in threading.enumerate()]",
    )
    (output,) = first
    assert "5 records of 2 layers" in output["data"]["text/html"]
    assert "Watch, closed" in output["data"]["text/html"]
    assert second == []
    assert "gradstat-live" not in third[-1]["data"]["text/plain"]


def test_history_and_watch_show_themselves_as_a_last_line() -> None:
    _, (first, second) = run("w = gradstat.watch(model)\ntrain(w, 3)\nw", "w.close()\nw.history")
    assert "Watch, open" in first[-1]["data"]["text/html"]
    assert "3 records of 2 layers" in second[-1]["data"]["text/html"]


def test_live_refuses_by_name() -> None:
    with gradstat.watch(torch.nn.Linear(2, 1)) as w:
        with pytest.raises(RuntimeError, match=r"live\(\) needs a notebook, which this is not"):
            w.live()
        with pytest.raises(TypeError, match="needs a number of seconds; every_s is '3'"):
            w.live("3")
        with pytest.raises(ValueError, match=r"needs 0.1 to 86,400 seconds; every_s is 0"):
            w.live(0)
    with pytest.raises(RuntimeError, match="needs a watch that is not closed"):
        w.live()
