"""The whole study on the testbed: generate, grade, map, diagnose, repair, grade again, score the maps.

    python benchmarks/reproduce.py [--model testbed-12] [--out out/reproduce] [--problems 2000] [--seed 0]

Parts, each on problems of its own (another seed):

1. Accuracy of the plain model, of the bridge, momentum and StepFlow, and of their controls, by difficulty;
   greedy, paired by problem. The same where every thinking step must be right, and with sampled answers.
2. What went wrong first in the plain model's wrong traces, and which of these errors StepFlow repairs.
3. A search over strengths and bands: chosen on validation problems, reported on test problems.
4. Lock-in and decay of right against wrong traces, matched one to one by number of steps and of tokens.
5. Bands chosen from half of these pairs; their effect, and the quarters', on the other half.
6. How well each score finds the true edges (`edges_by_layer.py`), and the same with shuffled edges.
7. Positive controls: `power.py`, `band_choice.py` and `repair.py` on planted failures, each a small run.

Writes `report.md`, its pictures and `study.json`. Nothing is tuned on what is reported. The parts run in
`--workers` processes of one thread each, so the figures do not depend on how many there are.
"""

import argparse
import json
import multiprocessing
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import band_choice
import edges_by_layer
import power
import repair
import study_report as report
import torch

from stepflow_tl import ReasoningTrace, StepFlow, diagnose, step_saliency
from stepflow_tl.cli.arguments import TESTBEDS
from stepflow_tl.evaluation import Decoding, evaluate, grid, questions_of, search, standard_conditions, steps
from stepflow_tl.evaluation.evaluation import Evaluation
from stepflow_tl.rendering import save_figure, step_map_figure
from stepflow_tl.testbed import ProblemSpec, load_testbed_model, make_problems
from stepflow_tl.testbed.model import FORMS

STEPS = {"testbed": (12, 16, 18, 20), "testbed-12": (8, 10, 12, 14)}
#: Small runs of the positive controls; `OUT` and the model are added.
CONTROLS = {
    "power": "--pool 24 --doses 1 2 4 8 --n 20 --draws 200",
    "band_choice": "--pool 24 --plantings 12 --doses 4 --n 12",
    "repair": "--pool 24 --doses 4 8 --tau 0.15 --alpha 0.06",
}
_worker = SimpleNamespace(model=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=STEPS, default="testbed-12")
    parser.add_argument("--out", type=Path, default=Path("out/reproduce"))
    parser.add_argument("--problems", type=int, default=2000, help="test problems of part 1")
    parser.add_argument("--sampled", type=int, default=60, help="problems with four sampled answers each")
    parser.add_argument("--searched", type=int, default=240, help="problems of part 3, half for choosing")
    parser.add_argument("--pairs", type=int, default=150, help="most matched pairs of part 4")
    parser.add_argument("--edges", type=int, default=100, help="test problems of part 6")
    parser.add_argument("--steps", type=int, nargs="+", help="of the problems")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    options.steps = options.steps or list(STEPS[options.model])
    options.out.mkdir(parents=True, exist_ok=True)
    n_layers = TESTBEDS[options.model]
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context, _begin, (n_layers,)) as pool:
        # The longest first, so that no worker idles at the end.
        searched = pool.submit(search_strengths, options)
        conditions = {name: pool.submit(answer_under, name, options) for name in standard_conditions()}
        edges = pool.submit(score_edges, options)
        controls = [pool.submit(positive_control, *each, options) for each in CONTROLS.items()]
        sampled = pool.submit(sample_answers, options)
        drawn = pool.submit(draw_map, options)
        results = {name: future.result().results[name] for name, future in conditions.items()}
        found = Evaluation(tuple(test_questions(options)), greedy(options), results, options.seed)
        chosen = matched(found, options)
        halves = [pool.submit(diagnose_pairs, chosen[i :: options.workers]) for i in range(options.workers)]
        pairs = [pair for half in halves for pair in half.result()]
        parts = [
            *report.head(options),
            *report.accuracy(found, found.regraded(steps), sampled.result()),
            *report.errors(found),
            *report.searched(searched.result()),
            *report.diagnosis(pairs, options.out),
            *report.bands(pairs, n_layers, options.seed),
            *report.edges(edges.result()),
            *report.positive_controls([control.result() for control in controls]),
            *report.one_map(drawn.result()),
        ]
    minutes = (time.perf_counter() - start) / 60
    parts.append(
        f"Took {minutes:.1f} minutes in {options.workers} processes of one thread, torch {torch.__version__}."
    )
    (options.out / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    data = {
        "evaluation": json.loads(found.to_json()),
        "errors": report.first_errors(found),
        "edges": edges.result(),
        "n_pairs": len(pairs),
    }
    (options.out / "study.json").write_text(json.dumps(data), encoding="utf-8")
    print(f"written: {options.out}/report.md, {options.out}/study.json ({minutes:.1f} minutes)")


def _begin(n_layers) -> None:
    torch.set_num_threads(1)
    _worker.n_layers = n_layers


def _model():
    """The testbed model, loaded once a worker."""
    if _worker.model is None:
        _worker.model = load_testbed_model(n_layers=_worker.n_layers)
    return _worker.model


def test_questions(options):
    return questions_of(problems_of(options, options.problems, 10_000))


def problems_of(options, n, seed):
    """`n` problems, as many of each number of steps."""
    form = FORMS[TESTBEDS[options.model]]
    specs = [ProblemSpec(n_steps=n_steps, **form) for n_steps in options.steps]
    return [p for spec in specs for p in make_problems(spec, n // len(specs), seed=seed + options.seed)]


def greedy(options, **sampling):
    per_step = 12 if options.model == "testbed" else 21  # more than any step has
    return Decoding(max_new_tokens=max(options.steps) * per_step + 24, batch_size=125, **sampling)


def answer_under(name, options):
    return evaluate(
        _model(),
        test_questions(options),
        conditions={name: standard_conditions()[name]},
        decoding=greedy(options),
        progress=_say,
    )


def sample_answers(options):
    questions = questions_of(problems_of(options, options.sampled, 30_000))
    decoding = greedy(options, temperature=1, n_samples=4)
    conditions = {name: standard_conditions()[name] for name in ("plain", "StepFlow", "StepFlow control")}
    return evaluate(_model(), questions, conditions=conditions, decoding=decoding, seed=options.seed)


def search_strengths(options):
    n_layers = TESTBEDS[options.model]
    halves = tuple(range(n_layers // 2)), tuple(range(n_layers // 2, n_layers))
    candidates = grid(tau_max=[0.02, 0.05, 0.15], alpha=[0.06, 0.5])
    candidates += grid(StepFlow(shallow=halves[0], deep=halves[1]), tau_max=[0.05, 0.15], alpha=[0.06])
    return search(
        _model(),
        questions_of(problems_of(options, options.searched, 20_000)),
        candidates,
        validation_part=0.5,
        decoding=greedy(options),
        seed=options.seed,
        progress=_say,
    )


def matched(found, options):
    """Tokens of a right and a wrong trace with equal numbers of steps and of tokens."""
    groups = {}
    plain = found.results["plain"]
    for question, (answer,), (is_right,) in zip(found.questions, plain.answers, plain.right, strict=True):
        if answer.finished:
            key = (question.difficulty, len(answer.tokens))
            groups.setdefault(key, {True: [], False: []})[is_right].append(answer.tokens)
    rng, chosen = random.Random(options.seed), []
    for sides in groups.values():
        for side in sides.values():
            rng.shuffle(side)
        chosen += list(zip(sides[True], sides[False], strict=False))
    rng.shuffle(chosen)
    return chosen[: options.pairs]


def diagnose_pairs(pairs):
    model = _model()
    return [
        tuple(
            diagnose(step_saliency(model, ReasoningTrace.from_tokens(model.tokenizer, list(tokens))))
            for tokens in pair
        )
        for pair in pairs
    ]


def score_edges(options):
    return edges_by_layer.study(
        SimpleNamespace(model=options.model, problems=options.edges, steps=[6, 10, 14], seed=options.seed)
    )


def positive_control(name, arguments, options):
    """The tables of a benchmark's small run."""
    main = {"power": power.main, "band_choice": band_choice.main, "repair": repair.main}[name]
    own = ["--model", options.model, "--seed", str(options.seed), "--out", str(options.out / name)]
    return main([*own, *arguments.split()])


def draw_map(options):
    """The map of one solution, to look at; returns its problem."""
    (problem,) = problems_of(SimpleNamespace(**{**vars(options), "steps": [10]}), 1, 0)
    saliency = step_saliency(_model(), edges_by_layer.trace_of(_model().tokenizer, problem))
    save_figure(step_map_figure(saliency), options.out / "map.png", dpi=150)
    return problem


def _say(line):
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
