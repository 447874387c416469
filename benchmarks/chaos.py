"""Kill a run over and over, resume it, and compare what is left with a run that nobody disturbed.

    python benchmarks/chaos.py                                # 200 traces, SIGKILL at 30 random moments
    python benchmarks/chaos.py --engine ray --kills 10        # each time one of two replicas is killed
    python benchmarks/chaos.py --task answers --questions 200 # the same for `evaluate`, under two conditions

1. `--traces` problems of the testbed become a file of JSON lines; with `--task answers`, `--questions` of
   them are what is asked.
2. One run goes through undisturbed.
3. `local`: the run is started, killed with SIGKILL at a random moment, and started again, `--kills` times;
   then it may finish. The moment: one in ten while the model loads, one in ten while earlier results are
   looked through, else some traces further on, drawn so that all kills spread over the data set.
   `ray`: one run with two replicas; `--kills` times, after a random while, one of them is killed. The run
   itself goes on, starting new ones.
4. Checked: every trace has a result that loads, is byte for byte the undisturbed one, and whose SHA-256 is in
   the manifest; no trace has two lines `done`; nothing else is in the folder; the manifests agree in
   everything but `seconds`, and so do the summaries. For answers: each has one line, which is the undisturbed
   one but for `seconds`; nothing else is in the folder; the tables agree.

Kills, waits and problems are drawn from `--seed`; where a kill lands depends on the machine.
"""

import argparse
import csv
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=("traces", "answers"), default="traces")
    parser.add_argument("--traces", "--questions", dest="traces", type=int, default=200)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        one_run = answer if arguments.task == "answers" else analyze
        return one_run(Path(arguments.child[0]), Path(arguments.child[1]), arguments.engine)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        return chaos(folder, arguments)


def analyze(traces: Path, out: Path, engine: str) -> int:
    """One run over traces, in a process of its own; says on stdout when it begins to work."""
    from stepflow_tl.runs import analyze_dataset
    from stepflow_tl.testbed.model import load_testbed_model

    report = analyze_dataset(
        load_testbed_model,
        traces,
        out,
        engine=engine,
        replicas=2 if engine == "ray" else None,
        watcher=Says(),
    )
    print("counts", json.dumps(report.counts), flush=True)
    return 0 if report.is_complete else 1


def answer(questions: Path, out: Path, engine: str) -> int:
    """The same for answers."""
    from stepflow_tl import StepFlow, evaluate
    from stepflow_tl.evaluation import Decoding
    from stepflow_tl.testbed.model import load_testbed_model

    found = evaluate(
        load_testbed_model,
        questions,
        out,
        conditions={"plain": None, "StepFlow": StepFlow(tau_max=0.3, alpha=0.3)},
        decoding=Decoding(max_new_tokens=100, batch_size=LINES_AT_ONCE),
        engine=engine,
        replicas=2 if engine == "ray" else None,
        watcher=Says(),
    )
    scores = {name: found.accuracy(name) for name in found.results} if found.questions else {}
    print("counts", json.dumps({"missing": found.n_missing, **scores}), flush=True)
    return 0 if not found.n_missing else 1


class Says:
    def begin(self, *facts: Any, **named: Any):
        print("begin", flush=True)

    def note(self, message):
        print("note", message, flush=True)

    def advance(self, *progress: Any, **named: Any):
        pass


def chaos(folder: Path, arguments: argparse.Namespace) -> int:
    rng = random.Random(arguments.seed)
    traces, calm, wild = folder / "traces.jsonl", folder / "calm", folder / "wild"
    write_traces(traces, arguments.traces, arguments.seed)

    def start(out: Path) -> subprocess.Popen:
        kind = ["--task", arguments.task, "--engine", arguments.engine]
        call = [sys.executable, __file__, *kind, "--child", str(traces), str(out)]
        return subprocess.Popen(call, stdout=subprocess.PIPE, text=True)

    started = time.monotonic()
    run = start(calm)
    wait_for(run, "begin")
    loading, began = time.monotonic() - started, time.monotonic()
    print("undisturbed:", wait_for(run, "counts").strip(), flush=True)
    run.wait()
    working = time.monotonic() - began
    print(f"undisturbed: {loading:.1f} s loading, {working:.1f} s at work", flush=True)
    kill = kill_replicas if arguments.engine == "ray" else kill_runs
    n_lines_expected = arguments.traces * (2 if arguments.task == "answers" else 1)
    killed = kill(lambda: start(wild), wild, n_lines_expected, arguments.kills, rng, loading, working)
    print(f"killed {killed} times with SIGKILL", flush=True)
    compared = compare_answers if arguments.task == "answers" else compare
    faults = compared(calm, wild, n_lines_expected)
    print(*(faults or ["no fault found"]), sep="\n")
    return 1 if faults else 0


def kill_runs(
    start, out: Path, n_traces: int, kills: int, rng: random.Random, loading: float, working: float
) -> int:
    """Start and kill the whole run; then let it finish."""
    killed, at = 0, []
    while killed < kills:
        run = start()
        kind = rng.random()
        if kind < 0.1:
            time.sleep(rng.uniform(0, loading))
        else:
            wait_for(run, "begin")
            begin = n_lines(out)
            mean = max(0, n_traces - begin) // (kills - killed)
            at_once = LINES_AT_ONCE if (out / "answers.jsonl").exists() else 0
            further = 0 if kind < 0.2 else rng.randint(1, max(1, 2 * mean - at_once))
            while run.poll() is None and n_lines(out) < begin + further:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 2 * working / n_traces))
        if run.poll() is None:
            run.send_signal(signal.SIGKILL)
            killed += 1
        run.wait()
        at.append(n_lines(out))
    print("lines in the ledger at each kill:", *at, flush=True)
    run = start()
    for line in run.stdout:
        print("last run:", line.strip()[:200], flush=True)
    run.wait()
    return killed


def kill_replicas(
    start, out: Path, n_traces: int, kills: int, rng: random.Random, loading: float, working: float
) -> int:
    """Kill one replica of the run, again and again."""
    run = start()
    wait_for(run, "begin")
    killed = 0
    while killed < kills and run.poll() is None:
        begin = n_lines(out)
        further = rng.randint(1, max(1, min(2 * n_traces // kills, (n_traces - begin) // 2)))
        while run.poll() is None and n_lines(out) < begin + further:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 4 * working / n_traces))
        replicas = sorted(replica_processes(run.pid))
        if replicas and run.poll() is None:
            os.kill(rng.choice(replicas), signal.SIGKILL)
            killed += 1
            print(f"killed a replica of {len(replicas)} with {n_lines(out)} lines in the ledger", flush=True)
    for line in run.stdout:
        print("run:", line.strip()[:200], flush=True)
    run.wait()
    return killed


def replica_processes(driver: int) -> list[int]:
    """Process ids of the replicas that descend from `driver`; Ray names its workers after the actor."""
    import psutil

    found = []
    if not psutil.pid_exists(driver):
        return found
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if "ray::_Replica" in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def wait_for(run: subprocess.Popen, word: str) -> str:
    for line in run.stdout:
        if line.startswith(word):
            return line
    return ""


def n_lines(out: Path) -> int:
    ledgers = [out / name for name in ("manifest.jsonl", "answers.jsonl")]
    return sum(path.read_bytes().count(b"\n") for path in ledgers if path.exists())


def write_traces(path: Path, n: int, seed: int) -> None:
    from stepflow_tl.testbed.problems import ProblemSpec, make_problems

    sizes = [ProblemSpec(n_steps=steps) for steps in (3, 4, 5, 6)]
    records = []
    for number in range(n):
        problem = make_problems(sizes[number % len(sizes)], 1, seed=seed + number)[0]
        fields = {"question": problem.question, "thinking": problem.thinking, "summary": problem.answer}
        fields["answer"] = problem.answer  # for those who ask
        records.append({"id": f"p{number}", **fields})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def compare(calm: Path, wild: Path, n_traces: int) -> list[str]:
    """What is wrong with the disturbed folder, in words."""
    from stepflow_tl.saliency import StepSaliency

    faults = []
    entries = {}
    for out in (calm, wild):
        lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()][1:]
        count = Counter(line["id"] for line in lines if line["kind"] == "done")
        faults += [f"{out.name}: {name} is done {times} times" for name, times in count.items() if times != 1]
        faults += [f"{out.name}: {line}" for line in lines if line["kind"] != "done"]
        if len(count) != n_traces:
            faults.append(f"{out.name}: {len(count)} of {n_traces} traces done")
        entries[out.name] = {line["id"]: {**line, "seconds": None} for line in lines}
    if entries["calm"] != entries["wild"]:
        faults.append("the manifests differ")
    names = {path.name for path in calm.iterdir()}
    if names != {path.name for path in wild.iterdir()}:
        faults.append(f"other files: {sorted(names ^ {path.name for path in wild.iterdir()})}")
    n_equal = 0
    for entry in entries["wild"].values():
        data = (wild / entry["file"]).read_bytes()
        StepSaliency.load(wild / entry["file"])
        if data != (calm / entry["file"]).read_bytes():
            faults.append(f"{entry['file']} differs from the undisturbed one")
        elif hashlib.sha256(data).hexdigest() != entry["sha256"]:
            faults.append(f"{entry['file']} is not what the manifest says")
        else:
            n_equal += 1
    rows = [list(csv.DictReader((out / "summary.csv").open())) for out in (calm, wild)]
    for row in (*rows[0], *rows[1]):
        row.update(seconds="", status="")
    if rows[0] != rows[1]:
        faults.append("the summaries differ")
    print(f"{n_equal} of {n_traces} results equal the undisturbed ones byte for byte")
    return faults


def compare_answers(calm: Path, wild: Path, n_answers: int) -> list[str]:
    """What is wrong with the disturbed answers, in words."""
    faults, headers, entries, tables = [], [], [], []
    for out in (calm, wild):
        header, *lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
        count = Counter(line["id"] for line in lines)
        faults += [f"{out.name}: {name} is there {times} times" for name, times in count.items() if times > 1]
        if len(count) != n_answers:
            faults.append(f"{out.name}: {len(count)} of {n_answers} answers")
        headers.append(header)
        entries.append({line["id"]: {**line, "seconds": None} for line in lines})
        table = json.loads((out / "evaluation.json").read_text())
        for condition in table["conditions"].values():
            condition["seconds"] = None
        tables.append(table)
        if others := {path.name for path in out.iterdir()} - ANSWER_FILES:
            faults.append(f"{out.name}: other files: {sorted(others)}")
    if headers[0] != headers[1] or tables[0] != tables[1]:
        faults.append("the headers or the tables differ")
    differing = [name for name, entry in entries[0].items() if entries[1].get(name) != entry]
    faults += [f"{name} differs from the undisturbed one" for name in differing]
    print(f"{n_answers - len(differing)} of {n_answers} answers equal the undisturbed ones")
    return faults


LINES_AT_ONCE = 8  # a batch of answers
ANSWER_FILES = {"answers.jsonl", "evaluation.json", "evaluation.txt"}


if __name__ == "__main__":
    sys.exit(main())
