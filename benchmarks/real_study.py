r"""The study of the real model: docs/study_plan.md says what is asked of it, and how it is decided.

    python benchmarks/real_study.py MODEL.gguf OUT --part within tasks search [--minutes 24]
    python benchmarks/real_study.py --same OUT OTHER      # are the answers and maps that both hold the same?

within: answers sampled by the plain model, shard after shard, until `--wanted` questions have a right and a
    wrong one; maps of the pair nearest in length; right against wrong within questions (`within_questions`).
    OUT/within/within.txt, within.json.
tasks: maths, science and code, greedy, under seven conditions: one call each of `stepflow-tl study` or
    `evaluate`, whose line is printed. OUT/TASK.
search: strengths, bands, and the layers and heads that `within` chose, on 200 questions that `tasks` does not
    ask; the best once on the 600 that it does. OUT/search, OUT/confirm.
report: what there is, with the verdicts of the plan's rules. OUT/report.md.

All goes on where it stopped: give the same command again. `--minutes` stops as Ctrl-C does: what is written
stays. Code is executed in the sandbox of `--grader code`.
"""

import argparse
import json
import shlex
import signal
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from within_questions import analyse, head_lock_in, in_words, tables

from stepflow_tl import StepFlow, compare
from stepflow_tl.cli.device import load
from stepflow_tl.cli.evaluate import AnswersWatcher
from stepflow_tl.cli.main import main as command_line
from stepflow_tl.errors import ComparisonError
from stepflow_tl.evaluation import Decoding, Prompting, read_questions, standard_conditions
from stepflow_tl.evaluation.paired_cells import AFTER_DIFFERENCE, difference_cells
from stepflow_tl.evaluation.search import control_of
from stepflow_tl.models.bands import deep_half
from stepflow_tl.results.tables import text_table
from stepflow_tl.runs import evaluate, read_answers
from stepflow_tl.runs.answer_file import ANSWERS, read_ledgers
from stepflow_tl.runs.manifest import Done, read_manifests
from stepflow_tl.runs.options import Shard
from stepflow_tl.runs.study_traces import choose_traces, write_rows
from stepflow_tl.statistics.effects import corrected

SEED = 0
N_CONFIRMED, N_SEARCHED = 600, 200  # the first questions of the file, and the next
SHARDS = 14  # of a pool: up to 64 answers each, one batch
WANTED = 80  # questions with a right and a wrong answer
LIKELY = ("2 steps", "3 steps")  # of solution: right answers are likely
POOLS = {"likely": True, "others": False}  # of `within`, in this order
BOXED = r"{question} Please reason step by step, and put your final answer within \boxed{}."
LETTER = r"{question} Please reason step by step, and put the letter of the right option within \boxed{}."
CODE = (
    "{question}\n\nFirst explain briefly, step by step, how this function has to work. "
    "Then write the whole function, with its imports, in one block of Python code."
)
STAGES = (
    "within/likely",
    "within/others",
    "maths",
    "science",
    "code",
    "search",
    "confirm",
)  # folders with answers
MATHS = Prompting("boxed", "paragraph", None, BOXED)
TASKS = {
    "maths": (
        *(
            "study",
            "gsm8k_questions.jsonl",
            "--grader",
            "maths",
            "--format",
            "boxed",
            "--max-new-tokens",
            "400",
        ),
        *("--maps", "100", "--pages", "40", "--limit", str(N_CONFIRMED), "--prompt", BOXED),
    ),
    "science": (
        *("evaluate", "arc_challenge_questions.jsonl", "--grader", "choice", "--format", "boxed"),
        *("--max-new-tokens", "320", "--limit", "400", "--prompt", LETTER),
    ),
    "code": (
        *("evaluate", "humaneval_questions.jsonl", "--grader", "code", "--allow-code-execution"),
        *("--format", "fenced", "--max-new-tokens", "512", "--prompt", CODE),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--conditions", nargs="+", default=list(standard_conditions()), help="of `tasks`")
    parser.add_argument("--wanted", type=int, default=WANTED, help="questions with both kinds of answers")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--minutes", type=float, help="stop after so many")
    parser.add_argument("--same", type=Path, nargs=2, metavar="OUT")
    options = parser.parse_args()
    if options.same:
        print(same(*options.same))
        return
    if options.out is None:
        parser.error("a model and a folder are needed")
    if options.minutes:
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 60 * options.minutes)
    for part in options.part:
        PARTS[part](options)


def within(options) -> None:
    out, questions = options.out / "within", maths(options)[N_CONFIRMED:]
    decoding = Decoding(400, temperature=0.7, n_samples=4, batch_size=64, seed=SEED)
    for name, likely in POOLS.items():
        pool = [q for q in questions if (q.difficulty in LIKELY) is likely]
        for index in range(SHARDS):
            found = answered(out)
            if len(found) and sum(len(pairs(each)[0]) for each in found.values()) >= options.wanted:
                break
            ids = {q.id for q in found[name].questions} if name in found else set()
            if not {q.id for q in pool[index::SHARDS]} <= ids:
                ask(options, pool, out / name, {"plain": None}, decoding, shard=Shard(index, SHARDS))
    model.cache_clear()
    found = {name: (each, *pairs(each)) for name, each in answered(out).items()}
    for name, (each, both, _) in found.items():
        print(f"{name}: {len(both)} of {len(each.questions)} questions have a right and a wrong answer")
    rows = [row for *_, choice in found.values() for row in choice.rows]
    write_rows(out / "traces.jsonl", sorted(rows, key=lambda row: row.question_id))
    line = ["analyze", str(out / "traces.jsonl"), "--out", str(out / "maps"), "--model", options.model]
    run([*line, "--format", "boxed", "--group-by", "right", "--pair-by", "question_id"])
    left_out = [f"{name}: {line}" for name, (*_, choice) in found.items() for line in choice.left_out]
    is_whole = len(found) == len(POOLS) and not any(each.n_missing for each, *_ in found.values())
    compare_within(out, left_out, is_interim=len(rows) < 2 * WANTED and not is_whole)


def answered(out):
    """By pool, the answers of `within` that there are."""
    return {name: read_answers(out / name) for name in POOLS if ANSWERS.files(out / name)}


def pairs(evaluation):
    """The questions with both kinds of answers, and the choice of one of each kind of all of them."""
    everything = choose_traces(evaluation, 1 << 30, SEED)
    both = set.intersection(
        *({r.question_id for r in everything.rows if r.right is kind} for kind in (True, False))
    )
    return both, choose_traces(evaluation, len(both), SEED)


def compare_within(out, left_out, *, is_interim) -> None:
    """Right against wrong from the maps' manifest: OUT/within.txt and within.json."""
    entries = [entry for entry in read_manifests(out / "maps").entries if isinstance(entry, Done)]
    groups = [[entry for entry in entries if entry.group is kind] for kind in (True, False)]
    traces, questions = (
        [[getattr(e, name) for e in group] for group in groups] for name in ("diagnosis", "pair")
    )
    ask = dict(names=("right", "wrong"), seed=SEED, n_bootstrap=10_000)
    paired = compare(*traces, pair_by=tuple(questions), **ask)
    try:
        matched = compare(*traces, match_on=("steps", "tokens"), **ask).matched
    except ComparisonError as error:  # a few traces: the first shards alone
        matched, left_out = None, (*left_out, str(error))
    heads = np.array([head_lock_in(out / "maps" / entry.file) for entry in entries])
    found = analyse(entries, heads, SEED)
    text = [f"Within questions\n{paired}", *(paired.table(name) for name in ("lock_in", "thinking_share"))]
    text += [*tables(found), f"Matched on steps and tokens, across questions\n{matched}", *left_out]
    (out / "within.txt").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    found |= {
        "comparison": paired.to_json(),
        "matched": matched and matched.to_json(),
        "left_out": list(left_out),
        "is_interim": is_interim,
    }
    (out / "within.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n\n".join(text))


def tasks(options) -> None:
    for task in options.tasks:
        command, questions, *arguments = TASKS[task]
        line = [command, str(options.data / questions), "--model", options.model, *arguments]
        line += ["--dtype", "bfloat16", "--batch-size", "32"]
        run([*line, "--conditions", *options.conditions, "--out", str(options.out / task)])


def search(options) -> None:
    chosen = json.loads((options.out / "within" / "within.json").read_text())
    flows = candidates(chosen["chosen_layers"], {int(k): v for k, v in chosen["chosen_heads"].items()})
    questions, decoding = maths(options), Decoding(400, batch_size=32)
    part = questions[N_CONFIRMED : N_CONFIRMED + N_SEARCHED]
    tried = ask(options, part, options.out / "search", flows, decoding)
    name = max(flows, key=tried.accuracy)  # of equals the first
    print(f"chosen on {len(part)} questions: {name}, {flows[name]}")
    conditions = {"plain": None, "StepFlow": flows[name], "StepFlow control": control_of(flows[name])}
    print(ask(options, questions[:N_CONFIRMED], options.out / "confirm", conditions, decoding).table())


def candidates(layers, heads):
    """What is searched, the paper's first: strengths, bands, and the layers and heads that `within` chose."""
    flows = {
        f"tau {t:g}, alpha {a:g}": StepFlow(tau_max=t, alpha=a) for t in (0.15, 0.05, 0.3) for a in (0.06, 0)
    }
    n_layers = 24
    half = deep_half(n_layers)
    flows["halves"] = StepFlow(shallow=range(half.start), deep=half)
    flows["steps"] = StepFlow(granularity="step")
    for tau in (0.15, 0.3):
        flows[f"chosen layers, tau {tau:g}"] = StepFlow(tau_max=tau, alpha=0, shallow=layers)
        flows[f"chosen heads, tau {tau:g}"] = StepFlow(
            tau_max=tau, alpha=0, shallow=sorted(heads), heads=heads
        )
    return flows


def report(options) -> None:
    """OUT/report.md: what there is of every part, with the verdicts of the plan's rules."""
    out, parts = options.out, ["# What the study of the real model found", f"`{shlex.join(sys.argv)}`"]
    ledgers = {name: read_answers(out / name) for name in STAGES if ANSWERS.files(out / name)}
    for name, found in ledgers.items():
        n = len(found.questions)
        parts.append(f"* {name}: {n} questions answered under every condition, {found.n_missing} not yet")
    if (out / "within" / "within.json").exists():
        text = (out / "within" / "within.txt").read_text().rstrip()
        sentences = "\n".join(
            f"* {line}" for line in in_words(json.loads((out / "within/within.json").read_text()))
        )
        parts += ["## (A) Right and wrong answers to the same question", sentences, f"```\n{text}\n```"]
    asked = {task: ledgers[task] for task in TASKS if task in ledgers}
    if asked:
        parts += ["## (B) Does StepFlow help?", primary(asked)]
    for title, names in (
        ("## (B) All conditions", TASKS),
        ("## (C) The search and its confirmation", STAGES[-2:]),
    ):
        for name in names:
            if name in ledgers:
                parts += [f"{title}: {name}", f"```\n{ledgers[name].table()}\n```"]
    (out / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"written: {out / 'report.md'}")


def primary(asked) -> str:
    """B1 and B2: StepFlow against plain and against its control, task by task, Holm over the tasks."""
    rows = []
    for against in ("plain", "StepFlow control"):
        found = [each.difference("StepFlow", against) for each in asked.values()]
        p_values = corrected(np.array([each.p_value for each in found]), "holm")
        for task, each, p in zip(asked, found, p_values, strict=True):
            rows.append([task, str(each.n), against, *difference_cells(each, p)])
    header = ["task", "questions", "minus", "difference", *AFTER_DIFFERENCE]
    return f"```\n{text_table('StepFlow, task by task', header, rows)}\n```"


def ask(options, questions, out, conditions, decoding, **others):
    """`evaluate` on maths questions; the process ends where it was stopped."""
    watcher = AnswersWatcher()
    try:
        found = evaluate(
            *(model(options.model), questions, out),
            conditions=conditions,
            decoding=decoding,
            prompting=MATHS,
            grader="maths",
            seed=SEED,
            watcher=watcher,
            **others,
        )
    finally:
        watcher.close()
    if found.stopped:
        sys.exit(f"stopped ({found.stopped}): the same command goes on")
    return found


@cache
def model(name):
    return load(name, "cpu", "bfloat16", None)


def maths(options):
    return read_questions(options.data / "gsm8k_questions.jsonl", "maths")


def run(line) -> None:
    print("stepflow-tl", shlex.join(line), flush=True)
    if status := command_line(line):
        sys.exit(status)


def same(out, other):
    """How many answers and maps two runs of `within` share, and how many of them are equal to the digit."""
    ledgers = [
        [read_ledgers(run / "within" / name)[1] for name in answered(run / "within")] for run in (out, other)
    ]
    answers = [
        {each.id: replace(each, seconds=0.0) for ledger in run for each in ledger.values()} for run in ledgers
    ]
    entries = [read_manifests(folder / "within" / "maps").entries for folder in (out, other)]
    maps = [{each.id: (each.sha256, each.to_json()["metrics"]) for each in found} for found in entries]
    lines = []
    for what, (first, second) in (("answers", answers), ("maps (bytes and metrics)", maps)):
        shared = first.keys() & second.keys()
        equal = sum(first[name] == second[name] for name in shared)
        lines.append(f"{what}: {equal} of {len(shared)} that both runs hold are equal")
    return "\n".join(lines)


PARTS = {"within": within, "tasks": tasks, "search": search, "report": report}

if __name__ == "__main__":
    main()
