"""Does a map find the steps that a step needs? Every layer of the testbed, against its true edges.

    python benchmarks/edges_by_layer.py [--model testbed] [--problems 200] [--steps 6 10 14] [--seed 0]
        [--shuffle]

The testbed model reads right solutions of fresh problems; each thinking step's candidates are the premises
and the earlier steps (`stepflow_tl.testbed.edges`). A score is a step map, heads averaged, rows normalised
below the diagonal, then averaged over the layers of a band. Step knockout cuts an edge in all layers at once
and so has one map. Intervals are BCa over problems. `best layer` is chosen by AUROC on as many other
problems, never on those reported. `--shuffle` replaces the true edges by
random ones: every score must fall to chance, or the benchmark is broken.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from stepflow_tl.causal import step_knockout
from stepflow_tl.cli.arguments import TESTBEDS
from stepflow_tl.models.bands import deep_band, shallow_band
from stepflow_tl.saliency import step_saliency
from stepflow_tl.saliency.baselines import baseline_maps
from stepflow_tl.statistics.resampling import bca_interval
from stepflow_tl.testbed import ProblemSpec, load_testbed_model, make_problems
from stepflow_tl.testbed.edges import edge_rows, score_rows, shuffled, trace_of
from stepflow_tl.testbed.model import FORMS

METRICS = ("AUROC", "average precision", "top-1")
SOURCES = ("both", "premises", "steps", "carried")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=TESTBEDS, default="testbed")
    parser.add_argument(
        "--problems", type=int, default=200, help="test problems; as many more choose the layer"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[6, 10, 14])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shuffle", action="store_true", help="random edges in place of the true ones")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = study(options)[options.shuffle]
    print(f"{options.problems} problems of {options.steps} steps, seed {options.seed}", end="")
    print(", SHUFFLED EDGES" if options.shuffle else "")
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def study(options):
    """Figures of every score, kind of source and place: with the true edges, and with shuffled ones."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one order of summation, so the table is the same to the last digit
    try:
        model = load_testbed_model(n_layers=TESTBEDS[options.model])
        train = measure(model, options, offset=1, knockout=False)
        test = measure(model, options, offset=2, knockout=True)
    finally:
        torch.set_num_threads(n_threads)
    return [
        summarise(train[shuffle], test[shuffle], np.random.default_rng(options.seed))
        for shuffle in (False, True)
    ]


def measure(model, options, offset, knockout):
    """`[problem, metric]` by (score, sources) and place: of true edges, and of shuffled ones."""
    per_length = [options.problems // len(options.steps)] * len(options.steps)
    per_length[0] += options.problems - sum(per_length)
    form = FORMS[TESTBEDS[options.model]]
    problems = [
        problem
        for n_steps, n in zip(options.steps, per_length, strict=True)
        for problem in make_problems(
            ProblemSpec(n_steps=n_steps, **form), n, seed=1000 * options.seed + offset
        )
    ]
    rng = np.random.default_rng([options.seed, offset])
    found = {}, {}
    for index, problem in enumerate(problems):
        trace = trace_of(model.tokenizer, problem)
        true = {sources: edge_rows(problem, trace, sources) for sources in SOURCES}
        edges = true, {sources: shuffled(own, rng) for sources, own in true.items()}
        scores = {name: places_of(maps) for name, maps in score_maps(model, trace, rng).items()}
        if knockout:
            scores["step knockout"] = {"all": knockout_map(model, trace, true["both"])}
        for name, places in scores.items():
            for values, rows in zip(found, edges, strict=True):
                for sources, own in rows.items():
                    if not own:  # a short problem may have no row with both kinds of candidate
                        continue
                    by_place = values.setdefault((name, sources), {})
                    for place, step_map in places.items():
                        by_place.setdefault(place, []).append(score_rows(own, step_map))
        print(f"\r{index + 1}/{len(problems)}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return [
        {key: {place: np.array(values) for place, values in places.items()} for key, places in own.items()}
        for own in found
    ]


def score_maps(model, trace, rng):
    """Every score's map, `[layer, query_step, key_step]`, rows summing to one."""
    maps = {
        "Step-Saliency, per token": step_saliency(model, trace).sums,
        "Step-Saliency, response": step_saliency(model, trace, objective="response").sums,
    }
    names = {"value_weighted": "value-weighted attention", "gradient": "gradient of attention"}
    names["rollout"] = "attention rollout"
    maps |= {names.get(name, name): sums for name, sums in baseline_maps(model, trace).items()}
    lengths = torch.tensor([step.token_end - step.token_start for step in trace.steps])
    found = {}
    for name, sums in maps.items():
        mean = (sums / (lengths[:, None] * lengths)).mean(1).numpy().astype(np.float64)
        below = np.tril(mean, -1)
        found[name] = below / np.maximum(below.sum(-1, keepdims=True), 1e-300)
    n_layers, n_steps = found["attention"].shape[:2]
    found["random"] = rng.random((n_layers, n_steps, n_steps))
    near = -np.abs(np.arange(n_steps)[:, None] - np.arange(n_steps)[None, :]).astype(float)
    found["nearness"] = np.broadcast_to(near, (n_layers, n_steps, n_steps))
    return found


def knockout_map(model, trace, rows):
    """Change of a step's NLL when it may not read a candidate: `[query_step, key_step]`."""
    pairs = [(row.query, candidate) for row in rows for candidate in row.candidates]
    return step_knockout(model, trace, pairs=pairs).effects.numpy()


def places_of(maps):
    """Each layer's map by its number, and the means over bands."""
    n_layers = len(maps)
    shallow, deep = list(shallow_band(n_layers)), list(deep_band(n_layers))
    middle = [layer for layer in range(n_layers) if layer not in shallow + deep]
    bands = {"shallow": shallow, "middle": middle, "deep": deep, "all": list(range(n_layers))}
    return dict(enumerate(maps)) | {name: maps[layers].mean(0) for name, layers in bands.items()}


def summarise(train, test, rng):
    rows = []
    for (name, sources), values in test.items():
        chosen = {place: place for place in values if isinstance(place, str)}
        layers = [place for place in values if not isinstance(place, str)]
        if layers:
            best = max(layers, key=lambda layer: train[name, sources][layer][:, 0].mean())
            chosen[f"best layer ({best})"] = best
        for place, key in chosen.items():
            low, high = bca_interval([(1, values[key])], confidence=0.95, n_bootstrap=4000, rng=rng)
            row = dict(score=name, sources=sources, layers=place)
            for i, metric in enumerate(METRICS):
                row[metric] = [float(values[key][:, i].mean()), float(low[i]), float(high[i])]
            rows.append(row)
    return rows


def table(rows):
    titles = {
        "both": "premises and earlier steps",
        "premises": "premises",
        "steps": "earlier steps, where the value was written",
        "carried": "earlier steps, where the model keeps it (one step later)",
    }
    lines = []
    for sources in dict.fromkeys(row["sources"] for row in rows):
        lines += ["", titles[sources], f"{'score':26}{'layers':>16}" + "".join(f"{m:>24}" for m in METRICS)]
        for row in rows:
            if row["sources"] == sources:
                cells = "".join("   {:.3f} [{:.3f}, {:.3f}]".format(*row[metric]) for metric in METRICS)
                lines.append(f"{row['score']:26}{row['layers']:>16}{cells}")
    return "\n".join(lines[1:])


if __name__ == "__main__":
    main()
