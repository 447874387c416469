"""The README's picture: the report page of one solution, a step chosen, as a browser shows it.

    python docs/scripts/readme_picture.py [--out docs/report_page.png] [--layer 5] [--step T4]

1. The testbed model reads a right solution of six steps, every line of the question a step of its own, so
   that what the picture shows can be held against what the step needs.
2. `report` writes the page. A headless Chromium (or Chrome, from the PATH) opens it offline,
   picks the layer, clicks the strongest cell of the step's row and takes the picture.

The browser is driven by the tests' own driver, `tests/chromium.py`. One thread, so the numbers are the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from stepflow_tl import load_testbed_model, report, step_saliency
from stepflow_tl.testbed import ProblemSpec, make_problems
from stepflow_tl.testbed.edges import trace_of

ROOT = Path(__file__).resolve().parents[2]
WIDTH, HEIGHT = 1180, 860
READY = "document.documentElement.dataset.shown"


def main() -> None:
    """Write the page, open it, choose, take the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "report_page.png")
    parser.add_argument("--layer", type=int, default=5)
    parser.add_argument("--step", default="T4")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from chromium import Browser

    torch.set_num_threads(1)
    model = load_testbed_model()
    (problem,) = make_problems(ProblemSpec(n_steps=6), 1, seed=0)
    saliency = step_saliency(model, trace_of(model.tokenizer, problem))
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        path = report(saliency, Path(folder) / "report.html")
        page = browser.open(path, width=WIDTH, height=HEIGHT)
        page.wait_for(READY)
        pick_layer(page, options.layer)
        row = saliency.labels.index(options.step)
        strongest = int(saliency.head_mean(layers=[options.layer])[0, row].argmax())
        click_cell(page, row, strongest, len(saliency.labels))
        if page.requests or page.errors:
            raise SystemExit(f"the page asked for {page.requests} and said {page.errors}")
        page.screenshot(options.out, whole=False)
    print(f"{options.out}: {options.out.stat().st_size / 1000:.0f} KB")


def pick_layer(page: Any, layer: int) -> None:
    """Choose a layer in the page's own list, as a person does, and wait until it is drawn."""
    page.evaluate(
        f"(() => {{ const s = document.getElementById('layer'); s.value = '{layer}';"
        " s.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )
    page.wait_for(f"{READY}.startsWith('{layer} ')")


def click_cell(page: Any, step: int, key: int, n_steps: int) -> None:
    """Click a cell of the map, which chooses its row's step."""
    cells = json.loads(page.evaluate("document.getElementById('map').dataset.cells"))
    x, y = page.evaluate(
        "(() => { const b = document.getElementById('map').getBoundingClientRect(); return [b.x, b.y]; })()"
    )
    size = cells["side"] / n_steps
    page.click(x + cells["left"] + (key + 0.5) * size, y + cells["top"] + (step + 0.5) * size)
    page.wait_for(f"document.querySelector('[aria-selected=true]')?.id === 'step-{step}'")


if __name__ == "__main__":
    main()
