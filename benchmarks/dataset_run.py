"""What a data set run costs beside its analyses, and whether its memory grows.

    python benchmarks/dataset_run.py --data ../shared/data/gsm8k_step_pairs.jsonl       # all 398 traces
    python benchmarks/dataset_run.py --data ... --limit 60
    python benchmarks/dataset_run.py --traces 200 --model testbed --skip-single         # RSS, short traces

1. Warm-up: one `step_saliency` of the first trace.
2. `single`: `step_saliency` of every trace, one after the other, nothing else timed.
3. `run`: `analyze_dataset` over the same file with the same loaded model, timed as a whole: reading,
   tokenising, analysis, diagnosis, hashing, writing with fsync, manifest, summary.
4. Throughput of the run relative to the single calls: time of 2 over time of 3. The two take turns in blocks
   of `--block` traces, so that a busy machine falls on both alike. With --stepflow, so does `repaired`, the
   run again, its maps of the repaired flow.
5. `resume`: the same call again, which finds everything done.
6. Resident memory is read after every trace of the run; its growth is the slope of a least-squares line over
   the second half, per 100 traces.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="JSON lines; problems of the testbed without it")
    parser.add_argument("--traces", type=int, default=200, help="how many testbed problems")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--model", default="smollm2", help="a name or path, or testbed")
    parser.add_argument("--splitter", default="line")
    parser.add_argument("--block", type=int, default=20)
    parser.add_argument("--stepflow", action="store_true", help="also run under StepFlow")
    parser.add_argument("--skip-single", action="store_true", help="measure memory only")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()

    from stepflow_tl.models.loading import load_model
    from stepflow_tl.runs import analyze_dataset
    from stepflow_tl.runs.records import read_records
    from stepflow_tl.saliency import step_saliency
    from stepflow_tl.stepflow import StepFlow
    from stepflow_tl.testbed.model import load_testbed_model
    from stepflow_tl.trace import ReasoningTrace

    model = load_testbed_model() if arguments.model == "testbed" else load_model(arguments.model)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = arguments.data or testbed_file(folder / "testbed.jsonl", arguments.traces)
        rows = [line for line in data.read_text("utf-8").splitlines() if line.strip()][: arguments.limit]
        blocks = [rows[i : i + arguments.block] for i in range(0, len(rows), arguments.block)]
        if arguments.skip_single:
            blocks = [rows]
        paths = []
        for number, block in enumerate(blocks):
            paths.append(folder / f"block{number}.jsonl")
            paths[-1].write_text("\n".join(block) + "\n", encoding="utf-8")

        def traces(path):
            for record in read_records(path):
                yield ReasoningTrace.from_parts(
                    model.tokenizer,
                    record.question,
                    record.thinking,
                    record.summary,
                    splitter=arguments.splitter,
                )

        step_saliency(model, next(traces(paths[0])))
        watcher = Memory()
        single, whole, repaired, resumed = [], [], [], []
        for number, path in enumerate(paths):
            out = folder / f"out{number}"

            def run(path=path, out=out):
                began = time.perf_counter()
                report = analyze_dataset(model, path, out, splitter=arguments.splitter, watcher=watcher)
                return time.perf_counter() - began, report

            def each(path=path):
                seconds = 0.0
                for trace in traces(path):
                    began = time.perf_counter()
                    step_saliency(model, trace)
                    seconds += time.perf_counter() - began
                return seconds

            if not arguments.skip_single and number % 2:
                single.append(each())
            seconds, report = run()
            assert report.is_complete, str(report)
            whole.append(seconds)
            if arguments.stepflow:
                began = time.perf_counter()
                report = analyze_dataset(
                    model,
                    path,
                    folder / f"repaired{number}",
                    splitter=arguments.splitter,
                    stepflow=StepFlow(),
                )
                repaired.append(time.perf_counter() - began)
                assert report.is_complete, str(report)
            if not arguments.skip_single and not number % 2:
                single.append(each())
            watcher.is_on = False
            resumed.append(run()[0])
            watcher.is_on = True
    figures = {
        "traces": len(rows),
        "tokens": watcher.n_tokens,
        "run_seconds": sum(whole),
        "resume_seconds": sum(resumed),
        **watcher.growth(),
    }
    if single:
        ratios = [a / b for a, b in zip(single, whole, strict=True)]
        figures |= {
            "single_seconds": sum(single),
            "throughput_relative_to_single": sum(single) / sum(whole),
            "median_over_blocks": statistics.median(ratios),
        }
    if repaired:
        ratios = [a / b for a, b in zip(whole, repaired, strict=True)]
        figures |= {
            "repaired_seconds": sum(repaired),
            "repaired_throughput": sum(whole) / sum(repaired),
            "repaired_throughput_by_block": [round(ratio, 3) for ratio in ratios],
        }
    for name, value in figures.items():
        print(f"{name:32} {value:.4g}" if isinstance(value, float) else f"{name:32} {value}")
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


class Memory:
    """A watcher that reads resident memory after every trace."""

    def __init__(self):
        self.mib, self.n_tokens, self.is_on = [], 0, True

    def begin(self, total, settings, replicas):
        pass

    def note(self, message):
        print(message, flush=True)

    def advance(self, n_tokens, seconds, tokens_left):
        if self.is_on:
            self.mib.append(resident_mib())
            self.n_tokens += n_tokens

    def growth(self) -> dict[str, float]:
        half = self.mib[len(self.mib) // 2 :]
        slope = float(np.polyfit(np.arange(len(half)), half, 1)[0]) if len(half) > 2 else float("nan")
        quarter = max(1, len(self.mib) // 4)
        return {
            "rss_first_mib": self.mib[0],
            "rss_mean_2nd_quarter_mib": float(np.mean(self.mib[quarter : 2 * quarter])),
            "rss_mean_last_quarter_mib": float(np.mean(self.mib[-quarter:])),
            "rss_peak_mib": max(self.mib),
            "rss_slope_mib_per_100_traces": 100 * slope,
        }


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def testbed_file(path: Path, n: int) -> Path:
    from chaos import write_traces

    write_traces(path, n, seed=0)
    return path


if __name__ == "__main__":
    main()
