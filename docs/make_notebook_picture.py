"""Take the documentation's picture of a notebook that shows a run: images/notebook.png.

Usage: python docs/make_notebook_picture.py. Needs ipykernel, nbclient, nbconvert, playwright and
Chromium.
"""

import io
import shutil
import tempfile
from pathlib import Path

import nbclient
import nbformat
from nbconvert import HTMLExporter
from PIL import Image
from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).parent / "images"
CELLS = (
    """import torch, gradstat
torch.manual_seed(0)
layers = [m for _ in range(8) for m in (torch.nn.Linear(32, 32), torch.nn.Sigmoid())]
model = torch.nn.Sequential(*layers)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)""",
    """w = gradstat.watch(model, name="main", optimizer=optimizer)
w.live()
for step in range(400):
    x = torch.rand(64, 32)
    loss = torch.nn.functional.mse_loss(model(x), x)
    optimizer.zero_grad()
    loss.backward()
    w.log(loss=loss)
    optimizer.step()
w.close()""",
)


def main() -> None:
    cells = [nbformat.v4.new_code_cell(cell) for cell in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=300).execute()
    text, _ = HTMLExporter(template_name="lab").from_notebook_node(notebook)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        page_path = Path(folder) / "notebook.html"
        page_path.write_text(text)
        chromium = shutil.which("chromium")
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 700})
        page.goto(page_path.as_uri())
        with Image.open(io.BytesIO(page.locator("main").screenshot())) as image:
            small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
            small.save(IMAGES / "notebook.png", optimize=True)
        browser.close()


if __name__ == "__main__":
    main()
