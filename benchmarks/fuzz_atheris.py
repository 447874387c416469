"""Coverage-guided fuzzing of the parsers that are pure Python, with atheris.

    python benchmarks/fuzz_atheris.py TARGET [--seconds 60] [--corpus FOLDER]

TARGET is "format scanner", "splitters", "records", "questions", "manifest" or "file names". Needs
`pip install atheris` (Python 3.11 to 3.13 on Linux; no dependency of this package). The corpus begins with
the target's valid inputs; inputs that reach new code are added to the folder. libFuzzer's options may follow
after `--`. An exception that is not the package's own, a hang of a second or 2 GB of memory ends the run with
the input in a file `crash-...`.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
# What the parsers need, imported before anything is instrumented: following torch's coverage leads nowhere.
import torch  # noqa: E402, F401

with atheris.instrument_imports(include=["stepflow_tl"]):
    import stepflow_tl.evaluation.questions  # noqa: F401
    import stepflow_tl.runs.manifest  # noqa: F401
    import stepflow_tl.runs.plan  # noqa: F401
    import stepflow_tl.runs.records  # noqa: F401
    import stepflow_tl.trace.formats.scanner  # noqa: F401
    import stepflow_tl.trace.splitting  # noqa: F401
from fuzz_targets import TARGETS, Refused  # noqa: E402

PURE = {target.name: target for target in TARGETS if target.is_python}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=list(PURE))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, default=None)
    parser.add_argument("options", nargs="*", help="of libFuzzer, after --")
    arguments = parser.parse_args()
    target = PURE[arguments.target]
    corpus = arguments.corpus or Path(tempfile.mkdtemp(prefix="stepflow-corpus-"))
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)

    def test_one_input(data: bytes) -> None:
        try:
            target.run(data)
        except Refused:
            pass

    limits = [
        f"-max_total_time={arguments.seconds}",
        "-timeout=1",
        "-rss_limit_mb=2048",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *limits, *arguments.options, str(corpus)], test_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
