"""How long the report page takes in a browser to open and to switch layers, at 120 steps of 28 layers.

    python benchmarks/report_page.py [--steps 120] [--layers 28] [--heads 32] [--repeats 5] [--json out.json]

Needs Chromium. The maps are made up (noise over five decades, which compresses worse than saliency), the text
is of ordinary length. Times are by the page's own clock: from the start of the navigation until the map is
drawn, and from a change of the layer control until the new map is drawn. Exit code 1 if a median misses its
goal: 3 s, 200 ms.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from chromium import Browser, Page  # noqa: E402
from made_maps import make_saliency  # noqa: E402

from stepflow_tl import report  # noqa: E402

OPEN_GOAL_MS, SWITCH_GOAL_MS = 3000, 200
SENTENCE = "So the sum of both numbers is even, and the next one follows from it. "
READY = "performance.getEntriesByName('shown').length"
# Choose an option and wait until its map is drawn and the browser is ready for the next frame.
CHOOSE = """
(async () => {{
  const control = document.getElementById({control!r});
  const before = performance.now();
  const drawn = new Promise((done) => {{
    new MutationObserver(done).observe(document.documentElement, {{attributes: true}});
  }});
  control.value = {value!r};
  control.dispatchEvent(new Event("change", {{bubbles: true}}));
  await drawn;
  await new Promise(requestAnimationFrame);
  return performance.now() - before;
}})()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", default=None)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    decades = torch.rand(options.layers, options.heads, options.steps, options.steps, generator=generator)
    saliency = make_saliency(options.steps - 4, 3, sums=torch.tril(10 ** (-5 * decades)), text=SENTENCE * 3)
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        path = report(saliency, Path(folder) / "report.html")
        megabytes = path.stat().st_size / 1e6
        times: dict[str, list[float]] = {"open": [], "layer": [], "first head": [], "head": []}
        for _ in range(options.repeats):
            page = browser.open(path)
            page.wait_for(READY)
            times["open"].append(page.evaluate("performance.getEntriesByName('shown')[0].startTime"))
            times["layer"] += [choose(page, "layer", layer) for layer in range(options.layers)]
            if page.evaluate("!document.getElementById('head').disabled"):
                # The heads' maps are decoded when the first of them is asked for.
                times["first head"].append(choose(page, "head", 0))
                times["head"] += [choose(page, "head", head) for head in range(1, options.heads)]
            page.close()
    print(f"{options.layers} layers x {options.heads} heads x {options.steps} steps: {megabytes:.1f} MB")
    print(f"{'':12}{'median ms':>12}{'largest ms':>12}{'goal':>8}")
    goals = {"open": OPEN_GOAL_MS, "layer": SWITCH_GOAL_MS}
    for name, found in times.items():
        if found:
            goal = goals.get(name, "")
            print(f"{name:12}{statistics.median(found):>12.0f}{max(found):>12.0f}{goal:>8}")
    if options.json:
        Path(options.json).write_text(json.dumps(dict(megabytes=megabytes, **times), indent=1))
    if any(statistics.median(times[name]) > goal for name, goal in goals.items()):
        raise SystemExit(1)


def choose(page: Page, control: str, value: int) -> float:
    return page.evaluate(CHOOSE.format(control=control, value=str(value)))


if __name__ == "__main__":
    main()
