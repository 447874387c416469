"""The same questions through lm-evaluation-harness, Inspect and our own `evaluate`: the same answers?

    python benchmarks/engines.py MODEL QUESTIONS.jsonl --out DIR [--n 50] [--conditions plain] [--kill plain]
        [--max-new-tokens 64] [--dtype float32]

1. Greedy answers to the first N questions, plain and under StepFlow, in one batch each, with one
   prompt and one format. MODEL is what `load_model` takes. The engines are run by their own command lines,
   each in a process of its own, on a local task.
2. The harness' texts are compared with those of `evaluate` character for character, Inspect's token for token
   (`--logprobs` makes it log them). Where two differ, the place is printed. Scores: what each engine's own
   scorer makes of the box, and our maths grader on `evaluate`'s answers.
3. `--kill CONDITION`: both engines answer again in batches of four; each is killed (SIGKILL) when half the
   answers are kept, and goes on by its own means: the same command with its `--use_cache`, and `inspect
   eval-retry`. Printed: how many answers were taken over, and whether all are those of the unbroken run.

A run whose result is in DIR is not repeated. The logs stay there, for `stepflow-tl compare-runs`. Needs both
engines (`make test-engines` installs them) and QUESTIONS with numbers for answers.
"""

import argparse
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

PROMPT = "{question} Answer with the calculation alone, in one line, and put the result within \\boxed{}."
CONDITIONS = {"plain": {}, "StepFlow": {"stepflow": "true"}}

HARNESS_TASK = r"""
task: local
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/q.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [], max_gen_toks: N_NEW, do_sample: false}
filter_list:
  - name: boxed
    filter: [{function: regex, regex_pattern: '\\boxed\{([^{}]*)\}'}, {function: take_first}]
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, regexes_to_ignore: ['[,$\\ ]']}
"""

INSPECT_TASK = r"""
import json
from pathlib import Path
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import pattern
from inspect_ai.solver import generate

@task
def local():
    rows = map(json.loads, (Path(__file__).parent / "q.jsonl").read_text().splitlines())
    samples = [Sample(input=row["prompt"], target=row["answer"], id=row["id"]) for row in rows]
    return Task(dataset=samples, solver=generate(), scorer=pattern(r"\\boxed\{[\s$\\]*([^{}]*?)\s*\}"))
"""


def write_tasks(asked, questions):
    rows = [
        {"id": q.id, "prompt": asked.prompt.replace("{question}", q.text), "answer": q.answer}
        for q in questions
    ]
    (asked.out / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = HARNESS_TASK.replace("FOLDER", str(asked.out)).replace("N_NEW", str(asked.max_new_tokens))
    (asked.out / "local.yaml").write_text(task)
    (asked.out / "local_task.py").write_text(INSPECT_TASK)


def shared(asked):
    return {"dtype": asked.dtype, "device": "cpu", "format": "boxed"}


def harness_command(asked, condition, folder, batch_size):
    options = {"pretrained": asked.model, **shared(asked), **CONDITIONS[condition]}
    options.pop("device")
    words = [sys.executable, "-m", "stepflow_tl.engines.lm_harness", "run", "--model", "stepflow"]
    words += ["--model_args", *(f"{name}={value}" for name, value in options.items())]
    words += ["--device", "cpu", "--batch_size", str(batch_size), "--apply_chat_template", "--tasks", "local"]
    words += ["--include_path", str(asked.out), "--output_path", str(folder), "--log_samples"]
    return [*words, "--use_cache", str(folder / "cache")]


def inspect_command(asked, condition, folder, batch_size):
    options = {**shared(asked), **CONDITIONS[condition], "batch_size": batch_size}
    words = [sys.executable, "-m", "inspect_ai", "eval", "local_task.py"]
    words += ["--model", f"stepflow/{asked.model}"]
    words += [word for name, value in options.items() for word in ("-M", f"{name}={value}")]
    words += ["--max-tokens", str(asked.max_new_tokens), "--max-connections", str(batch_size), "--logprobs"]
    return [*words, "--log-dir", str(folder), "--log-buffer", "1", "--display", "none"]


def start(command, asked, log):
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            command, cwd=asked.out, stdout=output, stderr=subprocess.STDOUT, env=environment(asked)
        )


def environment(asked):
    return {**os.environ, "HF_DATASETS_CACHE": str(asked.out / "datasets"), "HF_HUB_OFFLINE": "1"}


def run(command, asked, folder):
    """Run to the end; seconds, loading and imports included."""
    begin = time.perf_counter()
    if start(command, asked, folder / "output.txt").wait():
        sys.exit(f"{' '.join(command)}\nfailed: {folder / 'output.txt'}")
    return time.perf_counter() - begin


def harness_samples(folder):
    """Texts and scores, in the order of the questions; None without a finished run."""
    files = sorted(folder.rglob("samples_local_*.jsonl"))
    if not files:
        return None
    rows = sorted(map(json.loads, files[-1].read_text().splitlines()), key=lambda row: row["doc_id"])
    return [row["resps"][0][0] for row in rows], [row["exact_match"] for row in rows]


def inspect_samples(folder):
    """Tokens as texts, and scores, in the order of the questions; None without a finished run."""
    from inspect_ai.log import list_eval_logs, read_eval_log

    logs = [read_eval_log(log) for log in list_eval_logs(str(folder))] if folder.exists() else []
    log = next((each for each in logs if each.status == "success"), None)
    if log is None:
        return None
    by_id = {sample.id: sample for sample in log.samples}
    samples = [by_id[name] for name in log.eval.dataset.sample_ids]
    tokens = [[each.token for each in s.output.choices[0].logprobs.content] for s in samples]
    return tokens, [float(next(iter(s.scores.values())).value == "C") for s in samples]


def ours(asked, questions, condition, folder):
    """Tokens as texts, visible text and right answers of `evaluate`'s own writer."""
    import torch

    from stepflow_tl import load_model
    from stepflow_tl.evaluation import Decoding, Prompting, write_answers
    from stepflow_tl.evaluation.grading import grader_named
    from stepflow_tl.stepflow import StepFlow

    path = folder / "ours.json"
    if not path.exists():
        model = load_model(asked.model, dtype=getattr(torch, asked.dtype))
        decoding = Decoding(max_new_tokens=asked.max_new_tokens, batch_size=asked.n)
        flow = StepFlow() if CONDITIONS[condition] else None
        prompting = Prompting(format="boxed", prompt=asked.prompt)
        texts = [question.text for question in questions]
        found, seconds = write_answers(model, texts, flow, decoding, prompting=prompting)
        decode, grade = model.tokenizer.decode, grader_named("maths").grade
        kept = {"seconds": seconds, "tokens": [], "texts": [], "right": []}
        for question, [answer] in zip(questions, found, strict=True):
            new = answer.tokens[-answer.n_new :]
            kept["tokens"].append([decode([token]) for token in new])
            kept["texts"].append(decode(new, skip_special_tokens=True))
            kept["right"].append(bool(grade(question, answer)))
        path.write_text(json.dumps(kept))
    return json.loads(path.read_text())


def compared(name, found, expected):
    """How many are equal; where the first difference of each other one is, is printed."""
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one != other:
            at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
            at = min(len(one), len(other)) if at is None else at
            print(f"  {name}: question {number} differs at {at}: {one[at:][:20]!r} and {other[at:][:20]!r}")
    return sum(one == other for one, other in zip(found, expected, strict=True))


def agree(asked, questions, condition):
    folder = asked.out / condition
    folder.mkdir(parents=True, exist_ok=True)
    expected = ours(asked, questions, condition, folder)
    finished = sum(token.endswith(("<|im_end|>", "<|endoftext|>")) for *_, token in expected["tokens"])
    n_tokens, seconds = sum(map(len, expected["tokens"])), expected["seconds"]
    print(f"{condition}: evaluate {sum(expected['right'])} right, {finished} ended by themselves, "
          f"{n_tokens} tokens in {seconds:.0f} s", flush=True)  # fmt: skip
    for name, command, read, key in (
        ("lm-eval", harness_command, harness_samples, "texts"),
        ("inspect", inspect_command, inspect_samples, "tokens"),
    ):
        seconds = None
        if read(folder / name) is None:
            seconds = run(command(asked, condition, folder / name, asked.n), asked, folder / name)
        found, scores = read(folder / name)
        same = compared(name, found, expected[key])
        spent = "kept" if seconds is None else f"{seconds:.0f} s with loading"
        print(f"{condition}: {name} {sum(scores):.0f} right by its own scorer, {same} of {len(found)} "
              f"answers the same, {spent}", flush=True)  # fmt: skip


def kept_by_harness(folder):
    try:
        with sqlite3.connect(f"file:{folder}/cache_rank0.db?mode=ro", uri=True) as store:
            return store.execute("select count(*) from unnamed").fetchone()[0]
    except sqlite3.Error:
        return 0


def kept_by_inspect(folder):
    """Samples that the log, not yet closed, holds."""
    from inspect_ai.log import list_eval_logs, read_eval_log_sample_summaries

    try:
        return sum(each.completed for each in read_eval_log_sample_summaries(list_eval_logs(str(folder))[0]))
    except Exception:  # there is none yet, or it is being written
        return 0


def taken_over(name, folder):
    """How many answers the second run did not write."""
    if name == "lm-eval":
        return int(re.findall(r"Cached requests: (\d+)", (folder / "output.txt").read_text())[-1])
    from inspect_ai.log import read_eval_log

    killed, resumed = ({s.uuid for s in read_eval_log(str(p)).samples} for p in sorted(folder.glob("*.eval")))
    return len(killed & resumed)


def killed_and_resumed(asked, condition):
    for name, command, read, kept in (
        ("lm-eval", harness_command, harness_samples, kept_by_harness),
        ("inspect", inspect_command, inspect_samples, kept_by_inspect),
    ):
        whole, _ = read(asked.out / condition / name)
        folder = asked.out / f"{condition} killed" / name
        shutil.rmtree(folder, ignore_errors=True)
        process = start(command(asked, condition, folder, 4), asked, folder / "output.txt")
        while kept(folder) < asked.n // 2 and process.poll() is None:
            time.sleep(0.2)
        if process.poll() is not None:
            sys.exit(f"{name} ended before it was killed, with {process.returncode}: {folder / 'output.txt'}")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        n_kept = kept(folder)
        again = command(asked, condition, folder, 4)
        if name == "inspect":
            [log] = folder.glob("*.eval")
            again = [sys.executable, "-m", "inspect_ai", "eval-retry", str(log), "--log-dir", str(folder)]
        run(again, asked, folder)
        same, n_taken = compared(name, read(folder)[0], whole), taken_over(name, folder)
        print(f"{condition}: {name} killed with {n_kept} of {asked.n} answers kept; resumed, {n_taken} taken "
              f"over, {same} as without a kill", flush=True)  # fmt: skip


def main():
    from stepflow_tl.evaluation import read_questions

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("questions")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=50)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--conditions", nargs="*", choices=CONDITIONS, default=list(CONDITIONS))
    parser.add_argument("--kill", choices=CONDITIONS)
    asked = parser.parse_args()
    asked.out = asked.out.absolute()
    asked.out.mkdir(parents=True, exist_ok=True)
    if Path(asked.model).exists():
        asked.model = str(Path(asked.model).absolute())
    questions = read_questions(asked.questions, "maths")[: asked.n]
    write_tasks(asked, questions)
    print(
        f"{len(questions)} questions, {asked.max_new_tokens} new tokens, {asked.dtype}, greedy, {asked.model}"
    )
    for condition in asked.conditions:
        agree(asked, questions, condition)
    if asked.kill:
        killed_and_resumed(asked, asked.kill)


if __name__ == "__main__":
    main()
