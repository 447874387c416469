"""A run on a disk that fills up: what it says, what it leaves, and whether it goes on once there is room.

    python benchmarks/full_disk.py [--traces 24] [--kib 256]          # Linux; mounting needs root

1. Problems of the testbed are analysed into a tmpfs of `--kib`, which fills up on the way.
2. Checked: the run stops by itself and says why; every result there loads; no temporary file is left; the
   manifest has one whole line a result.
3. The tmpfs is made larger, the same call goes on and ends. Every result must be byte for byte that of a run
   on a disk with room, and none computed twice.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from chaos import write_traces

from stepflow_tl import StepSaliency, analyze_dataset, load_testbed_model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=int, default=24)
    parser.add_argument("--kib", type=int, default=256, help="size of the disk")
    options = parser.parse_args()
    model = load_testbed_model()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        traces, small, roomy = (folder / name for name in ("traces.jsonl", "small", "roomy"))
        write_traces(traces, options.traces, seed=0)
        small.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={options.kib}k", "tmpfs", str(small)]
        if subprocess.run(mount).returncode:
            print("no tmpfs can be mounted here: run it as root, outside a container")
            return 2
        try:
            return fill_and_go_on(model, traces, small, roomy)
        finally:
            subprocess.run(["umount", str(small)], check=True)


def fill_and_go_on(model, traces: Path, small: Path, roomy: Path) -> int:
    stopped = analyze_dataset(model, traces, small, watcher=Notes())
    results = sorted(small.glob("*.safetensors"))
    for path in results:
        StepSaliency.load(path)
    lines = [json.loads(line) for line in (small / "manifest.jsonl").read_text().splitlines()][1:]
    print(f"stopped={stopped.stopped!r} with {len(results)} results, {len(lines)} lines in the manifest")
    subprocess.run(["mount", "-o", "remount,size=1g", str(small)], check=True)
    resumed = analyze_dataset(model, traces, small, watcher=Notes())
    print(f"with room: {resumed.counts}, complete: {resumed.is_complete}")
    analyze_dataset(model, traces, roomy)
    expected = {path.name: path.read_bytes() for path in roomy.glob("*.safetensors")}
    found = {path.name: path.read_bytes() for path in small.glob("*.safetensors")}
    faults = [
        text
        for text, is_fault in {
            "the disk did not fill up: make it smaller": not stopped.stopped,
            "a line too many or too few": len(lines) != len(results),
            "a temporary file was left": any(small.glob(".*")),
            "the run did not end": not resumed.is_complete,
            "a trace was computed twice": resumed.counts.get("kept", 0) != len(results),
            "results differ from those of a disk with room": found != expected,
        }.items()
        if is_fault
    ]
    print(*(faults or [f"{len(found)} of {len(expected)} results equal byte for byte; no fault"]), sep="\n")
    return 1 if faults else 0


class Notes:
    """Prints what a run says."""

    def begin(self, total, settings, replicas):
        pass

    def note(self, message):
        print("note:", message)

    def advance(self, n_tokens, seconds, tokens_left):
        pass


if __name__ == "__main__":
    sys.exit(main())
