"""Write docs/models.md: which model families work, measured on tiny random models of each.

    python docs/scripts/model_support.py [--check] [FAMILY ...]

1. Every family of `tests/architectures/` is built, four layers, random weights, and put behind a
   TransformerBridge.
2. `tests/model_families/probe.py` runs every analysis on it and holds each against its slow twin in float64.
3. One row a family; refusals are numbered, and their reasons stand below the table.

With families named, their rows alone are printed. `--check` writes nothing and fails if the page is not what
a run finds. The test suite holds the page against a run row by row (`tests/model_families/test_matrix.py`).

Time: one to three seconds a family on one core.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "models.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

COLUMNS = (
    "family",
    "architecture",
    "checkpoints, for example",
    "result",
    "`per_token` maps",
    "other objectives",
    "Bridge",
    "Momentum",
    "cached generation",
    "knockout",
    "formats",
)
YES, NO = "yes", "no"
VERSIONS = ("transformer-lens", "transformers", "torch")


def main() -> None:
    """Write the page, check it, or print some rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if the page is out of date; write nothing")
    parser.add_argument("family", nargs="*", help="print the rows of these families only")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import torch
    from tiny_architectures import ARCHITECTURES

    torch.set_num_threads(1)  # operations this small only wait for a second thread
    found = {}
    for name in arguments.family or ARCHITECTURES:
        found[name] = measured(name)
        print(name, found[name].status, file=sys.stderr)
    if arguments.family:
        for name, support in found.items():
            print(
                row(name, support), *[f"  {what}: {why}" for why, what in reasons(support).items()], sep="\n"
            )
        return
    text = page(found)
    if not arguments.check:
        PAGE.write_text(text, "utf-8")
    elif PAGE.read_text("utf-8") != text:
        sys.exit(f"{PAGE.name}: out of date, run `python docs/scripts/model_support.py`")


def measured(name: str) -> Any:
    """What works on a tiny model of this family."""
    import torch
    from float64 import float64_everywhere
    from model_families.probe import probe
    from tiny_architectures import build_bridge

    dtype = torch.float64
    model = build_bridge(name, dtype=dtype)
    with float64_everywhere():
        return probe(model, made_trace())


def made_trace() -> Any:
    """A question, three thinking steps and one of summary, of unequal lengths."""
    from tiny_architectures import tiny_tokenizer

    from stepflow_tl.trace import ReasoningTrace

    parts = ("Is 7 odd?", "7 = 2*3 + 1.\n\nSo yes.\n\nOdd it is.", "Yes, odd.")
    tokenizer = tiny_tokenizer()
    return ReasoningTrace.from_tokens(tokenizer, ReasoningTrace.from_parts(tokenizer, *parts).tokens)


def row(name: str, support: Any) -> str:
    """A family's row of the table."""
    from tiny_architectures import ARCHITECTURES

    family, answers = ARCHITECTURES[name], support.answers

    def backends(objective: str) -> str:
        names = [
            key.split()[1] for key, reason in answers.items() if key.startswith(objective) and not reason
        ]
        return ", ".join(names) or NO

    def yes(capability: str) -> str:
        return NO if answers[capability] else YES

    knockout = {(False, False): NO, (False, True): "full passes"}.get(
        (not answers["cached knockout"], not answers["knockout"]), YES
    )
    cells = (
        f"`{name}`",
        f"`{family.adapter or family.model_class}`",
        family.examples,
        support.status,
        backends("per_token"),
        backends("response"),
        yes("bridge"),
        yes("momentum"),
        yes("cached generation"),
        knockout,
        ", ".join(family.formats),
    )
    return f"| {' | '.join(cells)} |"


def reasons(support: Any) -> dict[str, str]:
    """Each reason for a refusal, and what it refuses."""
    if not support.layers:
        return {general(support.whole): "everything"}
    found: dict[str, list[str]] = {}
    if support.whole:
        found[general(support.whole)] = ["all layers at once"]
    for capability, reason in support.answers.items():
        if reason:
            found.setdefault(general(reason), []).append(capability)
    return {reason: ", ".join(refused) for reason, refused in found.items()}


def general(reason: str) -> str:
    """A reason without what a run adds to it: the tiny model's name, layer numbers, a deviation's digits."""
    reason = re.sub(r"on 'tiny-\w+': on \d+ tokens its", "here: its", reason)
    reason = re.sub(r" by \d\.\de[+-]\d\d(?: \(tolerance \S+\))?", "", reason)
    reason = re.sub(r"blocks\.\d+\.", "blocks.N.", reason)
    reason = re.sub(r"Layers [\d, ]+ have one", "Other layers have one", reason)
    return re.sub(r"^layer \d+", "layer N", reason)


def page(found: dict[str, Any]) -> str:
    """The whole page."""
    order = ("works", "in part", "attention layers only", "refused")
    names = sorted(found, key=lambda name: (order.index(found[name].status), name))
    counts = [(status, sum(found[name].status == status for name in names)) for status in order]
    lines = [
        "<!-- Written by docs/scripts/model_support.py from a run; change that, or the package. -->",
        "# Models",
        "",
        *INTRODUCTION.strip().splitlines(),
        "",
        f"{len(names)} families: {', '.join(f'{count} {status}' for status, count in counts)}. Measured with "
        f"{', '.join(f'{package} {version(package)}' for package in VERSIONS)} by",
        "`python docs/scripts/model_support.py`.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *(row(name, found[name]) for name in names),
        "",
        "## What is refused, and why",
        "",
    ]
    by_reason: dict[str, list[str]] = {}
    for name in names:
        for reason, refused in reasons(found[name]).items():
            by_reason.setdefault(reason, []).append(f"`{name}` ({refused})")
    for reason, where in by_reason.items():
        lines += [f"- {reason}", f"  {'; '.join(where)}."]
    return "\n".join(lines) + "\n"


INTRODUCTION = """
Which model families work, behind a `TransformerBridge`. Each row is measured, not declared: a tiny random
model of the family (four layers, grouped queries, windows where it has them) goes through every analysis,
and every number is held against a slower path in float64: backends against the `hooks` backend (1e-8),
`per_token` rows against one backward pass per token (1e-8), decoding from a KV cache under StepFlow against
one pass (1e-6), knockout from a shared prefix against whole passes (1e-6).

- **works**: everything. **in part**: what the row says; the reasons are below the table.
- **attention layers only**: a hybrid. `step_saliency(model, trace, objective="response", layers=[...])`,
  `StepFlow(shallow=[...], deep=[...])` and `step_knockout(..., layers=[...])` serve the layers that have an
  attention pattern, and say nothing of what the other layers carry. `per_token` needs attention to be all
  that mixes positions, and is refused.
- **refused**: no layer has an attention pattern. The error says so before any hook is attached.
- `step_saliency` with its default `backend="auto"` takes the best of the backends listed. "knockout: full
  passes" is `step_knockout` without its shared prefix, which `method="auto"` finds out by itself.
- Formats are those of the reasoning models of a family in the package's table (`stepflow_tl.trace.formats`).

`HookedTransformer` of TransformerLens 3.9 has the `hooks` and `layerwise` backends, StepFlow, cached
generation and knockout.
"""

if __name__ == "__main__":
    main()
