"""A seeded mutation fuzzer over every parser and loader of the package.

    python benchmarks/fuzz.py [--inputs 100000] [--seed 0] [--only TARGET] [--out FOLDER] [--json out.json]

Each target of `tests/fuzz_targets.py` gets its share of the inputs: its own valid inputs first, which must be
taken, then changes of them. What may come out is an error of the package's own, or a result that holds. Any
other exception is a fault; so is an input that takes over a second of processor time (not of the clock: a
busy machine is no hang). Faults are printed with their input, which `--out` keeps as a file. Exit code 1 if
there is one.
"""

import argparse
import json
import random
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from fuzz_targets import TARGETS, Refused, Target, mutate  # noqa: E402

SECONDS_AN_INPUT = 1.0
MAX_SHOWN = 3


class TookTooLong(BaseException):
    """Not an Exception, so that no handler of the code under test takes it."""


@dataclass
class Count:
    name: str
    inputs: int = 0
    own_errors: int = 0
    accepted: int = 0
    slowest: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="over all targets (100000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[target.name for target in TARGETS], default=None)
    parser.add_argument("--out", type=Path, default=None, help="folder for the inputs that found a fault")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    targets = [target for target in TARGETS if options.only in (None, target.name)]
    signal.signal(signal.SIGPROF, stop)
    started = time.perf_counter()
    counts = []
    print(
        f"{'target':20}{'inputs':>9}{'own errors':>12}{'accepted':>10}{'faults':>8}{'slowest ms':>12}",
        flush=True,
    )
    for place, target in enumerate(targets):
        share = options.inputs // len(targets) + (place < options.inputs % len(targets))
        count = fuzz(target, share, options.seed, options.out)
        counts.append(count)
        print(line(count), flush=True)
    total = Count(
        "all",
        sum(count.inputs for count in counts),
        sum(count.own_errors for count in counts),
        sum(count.accepted for count in counts),
        max(count.slowest for count in counts),
        sum((count.faults for count in counts), Counter()),
    )
    print(f"{line(total)}\n{time.perf_counter() - started:.0f} s, seed {options.seed}")
    if options.json:
        options.json.write_text(json.dumps([asdict(count) for count in [*counts, total]], indent=1))
    raise SystemExit(1 if total.faults else 0)


def fuzz(target: Target, n: int, seed: int, out: Path | None) -> Count:
    count = Count(target.name)
    seeds = target.seeds()
    for data in seeds:
        target.run(data)  # a valid input is taken, and what loads at first use is loaded
    generator = random.Random(f"{seed} {target.name}")
    for _ in range(n):
        data = mutate(generator.choice(seeds), seeds, generator)
        count.inputs += 1
        before = time.process_time()
        try:
            signal.setitimer(signal.ITIMER_PROF, SECONDS_AN_INPUT)
            try:
                target.run(data)
                count.accepted += 1
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
        except Refused:
            count.own_errors += 1
        except TookTooLong:
            note(count, f"over {SECONDS_AN_INPUT:g} s", data, out)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            where = [frame for frame in frames if "stepflow_tl" in frame.filename] or frames
            key = f"{type(error).__name__} at {Path(where[-1].filename).name}:{where[-1].lineno}: {error}"
            note(count, key[:200], data, out)
        count.slowest = max(count.slowest, time.process_time() - before)
    return count


def stop(signum: int, frame: object) -> None:
    raise TookTooLong


def note(count: Count, key: str, data: bytes, out: Path | None) -> None:
    place = key.split(": ")[0]
    count.faults[place] += 1
    if count.faults[place] <= MAX_SHOWN:
        print(f"  FAULT in {count.name}, input {count.inputs}: {key}\n    {data[:200]!r}", flush=True)
    if out and count.faults[place] == 1:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{count.name.replace(' ', '-')}-{count.inputs}").write_bytes(data)


def line(count: Count) -> str:
    return (
        f"{count.name:20}{count.inputs:>9}{count.own_errors:>12}{count.accepted:>10}"
        f"{count.faults.total():>8}{1000 * count.slowest:>12.1f}"
    )


if __name__ == "__main__":
    main()
