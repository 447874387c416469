"""Does `choose_bands` find the band in which a failure was planted?

    python benchmarks/band_choice.py [--model testbed-12] [--plantings 20] [--doses 2 4] [--n 20]
        [--out out/bands]

1. For each failure, `--plantings` bands are drawn: Shallow Lock-in in the lowest k layers, Deep Decay in the
   highest k, k from 1 to half of the layers, each as often as the others but for the remainder.
2. Each is planted into `--n` traces, drawn from the pool of `power.py`; `--n` other traces stay plain. The
   bands are chosen as a user would, plain traces as the right ones and planted ones as the wrong.
3. A *hit* is the planted band itself, *near* a band that ends at most one layer beside it. Chance is what
   always choosing one band would hit, 1 / (half of the layers); the same with labels shuffled stands beside.

Maps are kept in `OUT/maps.jsonl`, one line each, and not made again. Writes `band_choice.txt`.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from power import PLANTS, add_source, kept_rows, model_and_traces

from stepflow_tl import diagnose, step_saliency
from stepflow_tl.diagnosis import Diagnosis, choose_bands


def main(arguments=None) -> str:
    """The tables, printed and returned; `arguments` as on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_source(parser)
    parser.set_defaults(model="testbed-12", steps=[6, 8, 10, 12])
    parser.add_argument("--plantings", type=int, default=20)
    parser.add_argument("--doses", type=float, nargs="+", default=[2, 4])
    parser.add_argument("--n", type=int, default=20, help="traces in each group")
    parser.add_argument("--out", type=Path, default=Path("out/bands"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    model, traces = model_and_traces(options)
    mapped, n_layers = Maps(model, traces, options.out / "maps.jsonl"), model.cfg.n_layers
    rng = np.random.default_rng(options.seed)
    lines = [
        f"{options.model}, {n_layers} layers, {options.plantings} plantings, {options.n} planted against "
        f"{options.n} plain traces, seed {options.seed}; chance {1 / (n_layers // 2):.2f}",
        f"{'failure':8} {'dose':>4}  {'hit':>16}  {'near':>16}  {'shuffled: hit':>16}  planted/chosen layers",
    ]
    for failure in PLANTS:
        sizes = rng.permutation(1 + np.arange(options.plantings) % (n_layers // 2))
        draws = [rng.permutation(list(traces))[: 2 * options.n] for _ in sizes]
        for dose in options.doses:
            found, shuffled = [], []
            for at, (size, names) in enumerate(zip(sizes, draws, strict=True)):
                layers = tuple(range(size) if failure == "lock_in" else range(n_layers - size, n_layers))
                plant = PLANTS[failure](dose, layers=layers)
                groups = [
                    [mapped(name, key, flow) for name in half]
                    for half, key, flow in (
                        (names[: options.n], "", None),
                        (names[options.n :], f"{failure} {dose:g} {size}", plant),
                    )
                ]
                mixed = [*groups[0], *groups[1]]
                order = rng.permutation(len(mixed))
                halves = [[mixed[i] for i in half] for half in (order[: options.n], order[options.n :])]
                found.append(chosen_size(groups, failure))
                shuffled.append(chosen_size(halves, failure))
                print(f"\r{failure} {dose:g}: {at + 1}/{len(sizes)}", end="", file=sys.stderr)
            pairs = ", ".join(f"{size}/{chosen}" for size, chosen in zip(sizes, found, strict=True))
            rates = [
                rate(np.abs(np.array(each) - sizes) <= within)
                for each, within in ((found, 0), (found, 1), (shuffled, 0))
            ]
            lines.append(
                f"{failure:8} {dose:4g}  " + "  ".join(f"{each:>16}" for each in rates) + f"  {pairs}"
            )
    print(file=sys.stderr)
    (options.out / "band_choice.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return "\n".join(lines)


class Maps:
    """Diagnoses of traces by name and by what is planted, from disk where they are there."""

    def __init__(self, model, traces, path):
        self.model, self.traces, self.path = model, traces, path
        self.held = {
            (row["trace"], row["tokens"], row["planted"]): Diagnosis.from_json(row["diagnosis"])
            for row in kept_rows(path)
        }

    def __call__(self, name, planted, flow):
        trace = self.traces[name]
        key = str(name), len(trace), planted
        if key not in self.held:
            self.held[key] = diagnose(step_saliency(self.model, trace, stepflow=flow))
            row = dict(zip(("trace", "tokens", "planted"), key, strict=True))
            with self.path.open("a") as file:
                file.write(json.dumps(row | {"diagnosis": self.held[key].to_json()}) + "\n")
        return self.held[key]


def chosen_size(groups, failure):
    """How many layers the band has that is chosen for this failure."""
    choice = choose_bands(*groups)
    return len(choice.shallow if failure == "lock_in" else choice.deep)


def rate(hits):
    """How many of how many, and Wilson's 95 % interval of the share."""
    n, part, z = len(hits), hits.mean(), 1.96
    middle, width = part + z * z / (2 * n), z * np.sqrt(part * (1 - part) / n + (z / (2 * n)) ** 2)
    low, high = ((middle + side * width) / (1 + z * z / n) for side in (-1, 1))
    return f"{hits.sum():2}/{n} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
