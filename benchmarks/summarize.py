"""Time and memory of `summarize` over a large run: 10 000 results of 28 layers and 12 steps by default.

    python benchmarks/summarize.py [--traces 10000] [--loose 1000] [--heads 16] [--folder DIR] [--json FILE]

The results are real files, one map's with other numbers, and the manifest is what `analyze` would write of
them, every trace in a group and a pair. Each case runs in a process of its own; its peak memory is the
kernel's (VmHWM), Python and torch in it. CPU time is that of all threads: on a busy machine it says more than
the clock. Cases: with the manifest; with the manifest, every file's SHA-256 compared; and `--loose` files
without a manifest, whose maps are read. Exit code 1 if the first case misses 30 s or 1 GiB.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
SECONDS_GOAL, MIB_GOAL = 30, 1024
N_LAYERS, SEGMENTS, STEP_TOKENS = 28, "QTTTTTTTTSSS", 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=int, default=10_000)
    parser.add_argument("--loose", type=int, default=1000)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--measure", nargs=3, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(*options.measure)
    folder = Path(tempfile.mkdtemp(prefix="summarize-", dir=options.folder))
    try:
        started = time.perf_counter()
        make_run(folder / "run", options.traces, options.heads)
        make_run(folder / "loose", options.loose, options.heads, manifest=False)
        n_bytes = sum(path.stat().st_size for path in (folder / "run").iterdir())
        print(f"{options.traces} + {options.loose} results made in {time.perf_counter() - started:.0f} s")
        print(f"the run holds {n_bytes / 1e9:.2f} GB\n")
        print(f"{'':28}{'traces':>8}{'seconds':>10}{'CPU s':>8}{'peak MiB':>10}{'table MB':>10}")
        cases = [
            ("manifest", "run", ""),
            ("manifest, SHA-256 compared", "run", "verify"),
            ("no manifest", "loose", ""),
        ]
        found = {}
        for name, run, verify in cases:
            out = folder / "layers.parquet"
            command = [sys.executable, __file__, "--measure", str(folder / run), str(out), verify]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            found[name] = row = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{name:28}{row['traces']:>8}{row['seconds']:>10.1f}{row['cpu_seconds']:>8.1f}"
                f"{row['peak_mib']:>10.0f}"
                f"{out.stat().st_size / 1e6:>10.1f}"
            )
    finally:
        shutil.rmtree(folder)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    if found["manifest"]["seconds"] > SECONDS_GOAL or found["manifest"]["peak_mib"] > MIB_GOAL:
        raise SystemExit(1)


def measure(folder: str, out: str, verify: str) -> None:
    """One case, in a fresh process: from the import to the printed tables."""
    started = time.perf_counter()
    from stepflow_tl import summarize

    aggregate = summarize(folder, out=out, verify=bool(verify))
    print(aggregate)
    print(aggregate.comparison)
    seconds = time.perf_counter() - started
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    row = {
        "traces": aggregate.n_traces,
        "seconds": seconds,
        "cpu_seconds": time.process_time(),
        "peak_mib": int(peak.split()[1]) / 1024,
    }
    assert aggregate.is_whole
    print(json.dumps(row))


def make_run(folder: Path, n: int, n_heads: int, *, manifest: bool = True) -> None:
    """n results: one file's bytes with the numbers of the map scaled, and their manifest lines.

    The metrics of the lines are drawn anew, so that no two traces agree.
    """
    import numpy as np
    import torch
    from diagnostic_maps import random_saliency

    from stepflow_tl import diagnose
    from stepflow_tl.diagnosis import LAYER_METRICS
    from stepflow_tl.runs.manifest import Done, RunSettings

    folder.mkdir(parents=True)
    saliency = random_saliency(
        SEGMENTS, 0, n_layers=N_LAYERS, lengths=[STEP_TOKENS] * len(SEGMENTS), head_gains=[1.0] * n_heads
    )
    template = bytearray(saliency.save(folder / "template").read_bytes())
    (folder / "template").unlink()
    start = 8 + int.from_bytes(template[:8], "little")
    values = torch.frombuffer(template, dtype=torch.float64, offset=start)  # changes the bytes in place
    measured = diagnose(saliency)
    generator = np.random.default_rng(0)
    lines = []
    for index in range(n):
        values *= 1 + 1e-3 * generator.random()
        file = f"trace-{index:06d}.safetensors"
        (folder / file).write_bytes(template)
        noise = 1 + 0.1 * generator.standard_normal((len(LAYER_METRICS), N_LAYERS))
        if not manifest:
            continue
        line = Done(
            id=f"trace-{index:06d}",
            line=index + 1,
            file=file,
            n_tokens=len(saliency.trace),
            seconds=1.0,
            group=index % 2 == 0,
            pair=f"p{index // 2}",
            sha256=hashlib.sha256(template).hexdigest(),
            diagnosis=measured,
            group_by="is_correct",
            pair_by="problem_id",
        ).to_json()
        for row, column in enumerate(line["metrics"].values()):
            column[:] = (np.array(column) * noise[row]).tolist()
        line["decay_slope"] *= noise[0, 0]
        lines.append(json.dumps(line))
    if manifest:
        settings = RunSettings(
            "tiny", "per_token", "torch.float64", measured.layers, N_LAYERS, "paragraph", "think"
        )
        header = {"schema": 1, "kind": "header", "settings": settings.to_json(), "stepflow_tl": "0.1.0"}
        text = "\n".join([json.dumps(header), *lines]) + "\n"
        (folder / "manifest.jsonl").write_text(text)


if __name__ == "__main__":
    main()
