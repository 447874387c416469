"""Three maps of the same traces, side by side: the paper's, the cut score, and screened cuts.

    python docs/scripts/side_by_side.py --model FILE.gguf --answers answers.jsonl --out DIR [--n 10]

1. Traces: of the answers that `stepflow-tl evaluate` wrote, the `--n` shortest right and the `--n` shortest
   wrong ones of the plain condition that came to an end and have 4 to 12 thinking steps. They are read by the
   model that wrote them, token by token as written.
2. The paper's map: per token, heads and layers averaged, rows as shares of earlier steps. The cut score, in
   nats, summed over heads and layers. Knockout: `step_knockout(pairs="screened")` with that map as ranking.
3. For each thinking and summary step and each map: its strongest source, and what cutting that one did. Where
   a strongest source was left to a group, it is cut as well. Beside the maps stands the step right before.
4. A picture of each trace, `DIR/ID.png`: blue crosses, the strongest source of a row; hatched, not cut alone.
   Then means over traces with 95 % BCa intervals over traces. Started again, it goes on where it was.

A map is said to be wrong of a step where its strongest source has an effect below 0.5 nats while another
measured source has at least 1 nat: a reader who follows it looks at an idle step and misses one that counts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepflow_tl import ReasoningTrace, Segment, load_model, step_knockout, step_saliency
from stepflow_tl.causal import StepKnockout
from stepflow_tl.models.facts import model_facts
from stepflow_tl.rendering import save_figure
from stepflow_tl.statistics.resampling import bca_interval

IDLE, COUNTS = 0.5, 1.0  # nats
MAPS = ("paper's map", "cut score")
ORDER = "the step before"  # what a reader without a map could say


def main() -> None:
    """Print a table, draw a picture of each trace."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="the model that wrote the answers")
    parser.add_argument("--answers", type=Path, required=True, help="answers.jsonl of `stepflow-tl evaluate`")
    parser.add_argument("--format", default="boxed", help="of the answers")
    parser.add_argument("--n", type=int, default=10, help="right answers, and as many wrong ones")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(options.model, dtype=getattr(torch, options.dtype))
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "rows.json"
    rows = json.loads(kept.read_text()) if kept.exists() else []
    for answer, trace in chosen_traces(model.tokenizer, options):
        if answer["id"] in {row["id"] for row in rows}:
            continue
        maps, knockout = measured(model, trace)
        rows.append(judged(trace, maps, knockout) | {"id": answer["id"], "right": answer["right"]})
        name = f"{'right' if answer['right'] else 'wrong'}_{answer['question_id']}"
        save_figure(figure(trace, maps, knockout), options.out / f"{name}.png", dpi=110)
        print(as_text(name, rows[-1], trace), flush=True)
        kept.write_text(json.dumps(rows, indent=1))
    print(summary(rows, f"{model_facts(model).name}, {options.dtype}"))


def chosen_traces(tokenizer: Any, options: argparse.Namespace) -> list[tuple[dict[str, Any], ReasoningTrace]]:
    """Answers and their traces, by the rule of the module's docstring."""
    found: dict[bool, list[tuple[dict[str, Any], ReasoningTrace]]] = {True: [], False: []}
    lines = map(json.loads, options.answers.read_text("utf-8").splitlines())
    rows = [row for row in lines if row.get("condition") == "plain" and row["finished"]]
    for row in sorted(rows, key=lambda row: len(row["tokens"])):
        if len(found[row["right"]]) == options.n:
            continue
        trace = ReasoningTrace.from_tokens(
            tokenizer, row["tokens"], format=options.format, question_splitter="sentence"
        )
        if 4 <= len(trace.steps_in(Segment.THINKING)) <= 12 and trace.steps_in(Segment.SUMMARY):
            found[row["right"]].append((row, trace))
    return [*found[True], *found[False]]


def measured(model: Any, trace: ReasoningTrace) -> tuple[dict[str, np.ndarray], StepKnockout]:
    """The maps, and the cuts; every map's strongest sources are among these."""
    saliency = step_saliency(model, trace)
    shares = saliency.head_mean().double().tril(-1).numpy()
    shares /= np.maximum(shares.sum(-1, keepdims=True), 1e-300)
    cut = step_saliency(model, trace, score="cut").sums.double().sum((0, 1)).tril(-1).numpy()
    nearness = np.tril(np.ones_like(cut), -1).cumsum(-1)
    maps: dict[str, np.ndarray] = dict(zip((*MAPS, ORDER), (shares.mean(0), cut, nearness), strict=True))
    knockout = step_knockout(model, trace, pairs="screened", ranking=saliency)
    strongest = {(q, int(values[q, :q].argmax())) for q in readers(trace) for values in maps.values()}
    missing = sorted(pair for pair in strongest if not knockout.measured[pair])
    if missing:
        more = step_knockout(model, trace, pairs=missing)
        maps["more"] = np.where(more.measured.numpy(), more.effects.numpy(), np.nan)
    return maps, knockout


def readers(trace: ReasoningTrace) -> list[int]:
    """Thinking and summary steps with a source and a prediction."""
    return [
        step.index
        for step in trace.steps
        if step.segment in (Segment.THINKING, Segment.SUMMARY) and 0 < step.token_start < len(trace) - 1
    ]


def effects_of(maps: dict[str, np.ndarray], knockout: StepKnockout) -> np.ndarray:
    """Effects of single cuts, NaN where there was none."""
    effects = np.where(knockout.measured.numpy(), knockout.effects.numpy(), np.nan)
    more = maps.get("more", np.full_like(effects, np.nan))
    return np.where(np.isnan(effects), more, effects)


def judged(trace: ReasoningTrace, maps: dict[str, np.ndarray], knockout: StepKnockout) -> dict[str, Any]:
    """Of each reader: the strongest source by each map and what cutting it did; where a map is wrong."""
    effects, steps = effects_of(maps, knockout), []
    for query in readers(trace):
        row = effects[query, :query]
        best = int(np.nanargmax(row))
        entry: dict[str, Any] = {"step": query, "knockout": [best, float(row[best])]}
        for name in (*MAPS, ORDER):
            key = int(maps[name][query, :query].argmax())
            entry[name] = [key, float(row[key])]
            entry[f"{name} wrong"] = bool(abs(row[key]) < IDLE and row[best] >= COUNTS)
        steps.append(entry)
    pairs = np.isfinite(effects) & np.tril(np.ones_like(effects, dtype=bool), -1)
    return {
        "steps": steps,
        "n_steps": len(trace.steps),
        "n_tokens": len(trace),
        "cut alone": float(pairs.sum() / (len(trace.steps) * (len(trace.steps) - 1) / 2)),
    }


def as_text(name: str, row: dict[str, Any], trace: ReasoningTrace) -> str:
    """The steps of which a map is wrong, and the step's text."""
    labels = [step.label for step in trace.steps]
    lines = [f"\n{name}: {row['n_steps']} steps, {row['n_tokens']} tokens, {row['cut alone']:.0%} cut alone"]
    for step in trace.steps:
        lines.append(f"  {step.label:>4}  {' '.join(step.text.split())[:100]}")
    for entry in row["steps"]:
        cells = [f"{who} {labels[entry[who][0]]} ({entry[who][1]:.2f})" for who in (*MAPS, "knockout")]
        flags = [name for name in MAPS if entry[f"{name} wrong"]]
        wrong = f"  WRONG: {', '.join(flags)}" if flags else ""
        lines.append(f"  {labels[entry['step']]:>4}: {', '.join(cells)}{wrong}")
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]], name: str) -> str:
    """Means over traces, with intervals."""
    rng = np.random.default_rng(0)
    lines = [f"\n{len(rows)} traces, {sum(len(r['steps']) for r in rows)} steps that read, {name}"]
    for which in (*MAPS, ORDER):
        columns = {
            "strongest source is the one that costs most": lambda e, w=which: e[w][0] == e["knockout"][0],
            f"strongest source has an effect of {IDLE} nats or more": lambda e, w=which: abs(e[w][1]) >= IDLE,
            f"wrong (below {IDLE}, another {COUNTS} or more)": lambda e, w=which: e[f"{w} wrong"],
        }
        for what, value in columns.items():
            means = np.array([[np.mean([value(entry) for entry in row["steps"]])] for row in rows])
            low, high = bca_interval([(1, means)], confidence=0.95, n_bootstrap=4000, rng=rng)
            lines.append(f"{which}: {what}: {means.mean():.3f} [{low[0]:.3f}, {high[0]:.3f}]")
    return "\n".join(lines)


def figure(trace: ReasoningTrace, maps: dict[str, np.ndarray], knockout: StepKnockout) -> Any:
    """Rows of thinking and summary in the three maps."""
    from matplotlib.figure import Figure

    rows, labels = readers(trace), [step.label for step in trace.steps]
    effects = effects_of(maps, knockout)
    nats = max(1.0, float(np.nanquantile(np.abs(effects[rows]), 0.97)))
    most = max(1e-3, float(np.quantile(np.abs(maps["cut score"][rows]), 0.97)))
    panels = {
        "paper's map, shares": (maps[MAPS[0]], {"cmap": "magma_r", "vmin": 0}),
        "cut score, nats": (maps[MAPS[1]], {"cmap": "RdBu_r", "vmin": -most, "vmax": most}),
        "screened cuts, nats": (effects, {"cmap": "RdBu_r", "vmin": -nats, "vmax": nats}),
    }
    height = 0.7 + 0.2 * len(rows)
    drawing = Figure((11.0, height), facecolor="white")
    axes = drawing.subplots(1, len(panels), sharey=True)
    words = [" ".join(trace.steps[row].text.split()) for row in rows]
    for axis, (title, (values, style)) in zip(axes, panels.items(), strict=True):
        shown = values[rows]
        above = np.arange(shown.shape[1])[None] >= np.array(rows)[:, None]
        axis.set_facecolor("#e8e8e8")
        image = axis.imshow(np.ma.masked_where(above | np.isnan(shown), shown), aspect="auto", **style)
        for place, row in enumerate(rows):
            axis.plot(int(np.nanargmax(values[row, :row])), place, "x", color="#009E73", ms=5, mew=1.6)
            for key in range(row):
                if np.isnan(values[row, key]):
                    axis.text(key, place, "/", ha="center", va="center", fontsize=6, color="#888888")
        axis.set_title(title, fontsize=8)
        axis.set_xticks(range(len(labels)), labels, fontsize=6)
        names = [
            f"{text[:44]}{'…' if len(text) > 44 else ''}  {labels[row]}"
            for row, text in zip(rows, words, strict=True)
        ]
        axis.set_yticks(range(len(rows)), [name.replace("$", r"\$") for name in names], fontsize=6)
        drawing.colorbar(image, ax=axis, fraction=0.04, pad=0.02).ax.tick_params(labelsize=6)
    drawing.subplots_adjust(left=0.22, right=0.97, top=1 - 0.3 / height, bottom=0.25 / height, wspace=0.16)
    return drawing


if __name__ == "__main__":
    main()
