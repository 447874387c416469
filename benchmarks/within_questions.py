"""Right against wrong answers to the same question: by head, at equal length, a choice tested elsewhere.

1. A pair is the mean of a question's right answers that have a map minus the mean of its wrong ones; the
   headline and all layers are `compare(pair_by=...)`'s.
2. Length taken out: `d = a + b x` over pairs, d a metric's difference, x those of thinking steps and of log
   tokens. a is the difference between answers of equal length. Interval: percentile bootstrap over pairs. p:
   right and wrong are exchanged pair by pair (d and x change sign together), two-sided, the statistic |a|.
3. Per head: lock_in of each head's own map, all layers x heads, Holm and Benjamini-Hochberg over all.
4. Chosen on half of the questions (`halves`), by d_z, most negative first: as many layers as a quarter, and
   as many heads as half a layer band; their mean is tested once on the other half, Holm over the two tests.

Everything is seeded; the order in which pairs come does not matter to 1, 3 and 4.
"""

import hashlib

import numpy as np

from stepflow_tl import StepSaliency
from stepflow_tl.diagnosis.layer_metrics import HEADLINE, headline_name, lock_in
from stepflow_tl.diagnosis.shares import MapShares
from stepflow_tl.results.tables import number, probability, text_table
from stepflow_tl.statistics.effects import Resampling, column_effects, corrected

N_HEADS_CHOSEN = 12
DRAWS = 10_000
INTERIM_LEVEL = 0.001  # Haybittle and Peto: the last test keeps its own
EARLIER = -0.0225  # between questions, n = 52


def head_lock_in(path):
    """`lock_in[layer, head]` of a stored map, each head's own rows normalised."""
    return lock_in(MapShares.of(StepSaliency.load(path), per_head=True)).numpy()


def differences(values, questions, right):
    """Names of the questions with both kinds, and right minus wrong `[pair, column]`, means within each kind.

    Args:
        values: `[trace, column]`; NaN where a trace has no value.
        questions: Of each trace.
        right: Of each trace.
    """
    questions, right = np.array(questions), np.array(right)
    names = sorted(set(questions[right]) & set(questions[~right]))
    sides = [
        [_mean(values[(questions == name) & (right == side)]) for name in names] for side in (True, False)
    ]
    return names, np.array(sides[0]) - np.array(sides[1])


def _mean(rows):
    count = (~np.isnan(rows)).sum(0)
    return np.where(count > 0, np.nansum(rows, axis=0) / np.maximum(count, 1), np.nan)


def without_length(d, x, seed, draws=DRAWS):
    """The intercept of `d = a + b x`, its bootstrap interval and p-value: `(a, low, high, p)`.

    Args:
        d: Differences `[pair]`.
        x: Differences of the covariates `[pair, covariate]`.
        seed: Of the resamples and exchanges.
        draws: How many of each.
    """
    n, rng = len(d), np.random.default_rng(seed)
    design = np.column_stack([np.ones(n), x])
    weights = rng.multinomial(n, np.full(n, 1 / n), size=draws)
    gram = np.einsum("ri,ij,ik->rjk", weights, design, design)
    moments = np.einsum("ri,ij,i->rj", weights, design, d)
    low, high = np.quantile((np.linalg.pinv(gram) @ moments[..., None])[:, 0, 0], (0.025, 0.975))
    # Exchanging a pair changes the sign of its row but for the constant's: a is the coefficient of the signs.
    signs = np.concatenate([np.ones((1, n)), rng.integers(0, 2, size=(draws, n)) * 2.0 - 1.0])
    kept = signs @ (np.eye(n) - x @ np.linalg.pinv(x))  # what the covariates, without a constant, leave
    found = kept @ d / (kept * signs).sum(1)  # the observed one first
    p = float(np.mean(np.abs(found) >= abs(found[0]) * (1 - 1e-9)))
    return float(found[0]), float(low), float(high), p


def halves(names, seed):
    """Which names are in the first half: an order of their hashes, so that no order of theirs matters."""
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).hexdigest())
    first = set(order[: (len(order) + 1) // 2])
    return np.array([name in first for name in names])


def most_negative(d, n):
    """The `n` columns of `d` `[pair, column]` with the most negative mean over standard deviation."""
    size = np.nanmean(d, 0) / np.nanstd(d, 0, ddof=1)
    return sorted(np.argsort(size, kind="stable")[:n].tolist())


def tested(d, seed):
    """Effects of difference columns against nothing, as `statistics.effects` has them."""
    return column_effects(d, np.zeros_like(d), paired=True, resampling=Resampling(0.95, DRAWS, DRAWS, seed))


def analyse(entries, heads, seed):
    """Numbers 2 to 4 of the module, as plain data.

    Args:
        entries: Of the manifest: diagnosis, pair (the question) and group (right) of each trace.
        heads: `[trace, layer, head]`, the entries' `head_lock_in`.
        seed: Of the halves and the resampling.
    """
    questions, right = [entry.pair for entry in entries], [bool(entry.group) for entry in entries]
    found = [entry.diagnosis for entry in entries]
    covariates = np.array([[each.n_thinking, np.log(each.n_tokens)] for each in found])
    headline = np.array([list(each.headline.values()) for each in found])
    by_layer = np.array([each.lock_in.numpy() for each in found])
    names, d = differences(np.column_stack([covariates, headline]), questions, right)
    alike = {}
    for column, (metric, band) in enumerate(HEADLINE, start=2):
        kept = ~np.isnan(d[:, [0, 1, column]]).any(1)
        alike[headline_name(metric, band)] = (
            int(kept.sum()),
            *without_length(d[kept, column], d[kept, :2], seed),
        )
    n_layers, n_heads = heads.shape[1:]
    _, of_layers = differences(by_layer, questions, right)
    _, of_heads = differences(heads.reshape(len(heads), -1), questions, right)
    first = halves(names, seed)
    layers = most_negative(of_layers[first], len(found[0].layers) // 4)
    chosen = most_negative(of_heads[first], N_HEADS_CHOSEN)
    means = np.column_stack([of_layers[:, layers].mean(1), of_heads[:, chosen].mean(1)])
    sides = {name: tested(means[side], seed) for name, side in (("chosen on", first), ("tested on", ~first))}
    effects = tested(of_heads, seed)
    p_values = effects["p_value"]
    order = np.argsort(p_values, kind="stable")[:N_HEADS_CHOSEN]
    holm, fdr = (corrected(p_values, how) for how in ("holm", "fdr_bh"))
    statistics = ("n", "difference", "low", "high", "effect_size", "p_value")
    return {
        "n_questions": len(names),
        "length_gap": {
            "thinking steps": float(d[:, 0].mean()),
            "tokens, ratio": float(np.exp(d[:, 1].mean())),
        },
        "at equal length": {
            name: dict(zip(("n", "difference", "low", "high", "p_value"), values, strict=True))
            for name, values in alike.items()
        },
        "heads": [
            {
                "layer": int(column) // n_heads,
                "head": int(column) % n_heads,
                **{name: float(effects[name][column]) for name in statistics},
                "holm": float(holm[column]),
                "fdr": float(fdr[column]),
            }
            for column in order
        ],
        "heads_below": {"holm": int((holm <= 0.05).sum()), "fdr": int((fdr <= 0.05).sum())},
        "n_heads_tested": n_layers * n_heads,
        "chosen_layers": layers,
        "chosen_heads": {
            str(layer): [column % n_heads for column in chosen if column // n_heads == layer]
            for layer in sorted({column // n_heads for column in chosen})
        },
        "chosen": {
            side: {
                kind: {name: float(values[name][column]) for name in statistics}
                | {"holm": float(corrected(values["p_value"], "holm")[column])}
                for column, kind in enumerate(("layers", "heads"))
            }
            for side, values in sides.items()
        },
    }


def in_words(found):
    """What the plan's questions A1 to A7 come to, by its rules; `found` as within.json has it."""
    primary = _named(found["comparison"]["headline"], "lock_in", "shallow")
    alike = found["at equal length"]["lock_in shallow"]
    level = INTERIM_LEVEL if found["is_interim"] else 0.05
    lower, still = (each["difference"] < 0 and each["p_value"] <= level for each in (primary, alike))
    still = still and alike["high"] < 0
    verdict = (
        "Lower lock-in in right answers stands within the question, at equal length too."
        if lower and still
        else "Lower lock-in in right answers stands within the question, but length may be what differs."
        if lower
        else "Lower lock-in in right answers is not shown within the question."
        if primary["p_value"] > level
        else "Lock-in is higher in right answers to the same question, against the earlier finding."
    )
    verdict = f"Interim look, level {level:g}: {verdict}" if found["is_interim"] else verdict
    holds = "holds" if primary["low"] <= EARLIER <= primary["high"] else "does not hold"
    yield (
        f"**{verdict}** A1: {_effect(primary)}, d_z {number(primary['effect_size'])}, n {primary['n']}; "
        f"A2, at equal length: {_effect(alike)}. The interval of A1 {holds} the earlier {EARLIER}."
    )
    others = [
        e for e in found["comparison"]["headline"] if (e["metric"], e["band"]) != ("lock_in", "shallow")
    ]
    yield "A3: " + _below(others, "p_corrected", lambda e: headline_name(e["metric"], e["band"]), "number")
    for metric in ("lock_in", "thinking_share"):
        layers = [e for e in found["comparison"]["by_layer"] if e["metric"] == metric]
        yield f"A4, {metric}: " + _below(layers, "p_corrected", lambda e: f"layer {e['layer']}", "layer")
    heads = found["heads_below"]
    yield (
        f"A5: of {found['n_heads_tested']} heads {heads['holm']} differ after Holm, {heads['fdr']} after "
        "Benjamini-Hochberg."
    )
    for kind, each in found["chosen"]["tested on"].items():
        before = found["chosen"]["chosen on"][kind]["difference"]
        yield (
            f"A6, {kind} chosen on half of the questions ({before:+.4f} there), on the other half: "
            f"{_effect(each)}, after Holm {probability(each['holm'])}, n {each['n']:.0f}."
        )
    if found["matched"]:
        matched = _named(found["matched"]["headline"], "lock_in", "shallow")
        words = f"{_effect(matched)}, after Holm {probability(matched['p_corrected'])}, n {matched['n']}"
        yield f"A7, matched across questions: {words}."


def _named(effects, metric, band):
    return next(each for each in effects if (each["metric"], each["band"]) == (metric, band))


def _effect(each):
    interval = "{difference:+.4f} [{low:+.4f}, {high:+.4f}]".format(**each)
    return f"{interval}, p {probability(each['p_value'])}"


def _below(effects, p, name, what):
    found = [
        f"{name(e)} {_effect(e)}, after Holm {probability(e[p])}" for e in effects if (e[p] or 1) <= 0.05
    ]
    return f"{'; '.join(found)}." if found else f"no {what} of {len(effects)} differs after Holm."


def tables(found):
    """What `analyse` found, as text."""
    gap = found["length_gap"]
    rows = [
        [name, str(each["n"]), *_cells(each), probability(each["p_value"])]
        for name, each in found["at equal length"].items()
    ]
    yield text_table(
        "Right minus wrong within questions, at equal length",
        ["number", "n", "difference", "95% low", "95% high", "p"],
        rows,
        [
            f"right minus wrong before: {gap['thinking steps']:+.2f} thinking steps, tokens times "
            f"{gap['tokens, ratio']:.3f}",
            "least squares on both differences; p not corrected",
        ],
    )
    rows = [
        [f"{each['layer']}.{each['head']}", f"{each['n']:.0f}", *_cells(each), number(each["effect_size"])]
        + [probability(each[name]) for name in ("p_value", "holm", "fdr")]
        for each in found["heads"]
    ]
    below = found["heads_below"]
    yield text_table(
        "lock_in head by head, the smallest p first",
        ["layer.head", "pairs", "difference", "95% low", "95% high", "d_z", "p", "Holm p", "BH p"],
        rows,
        [
            f"of {found['n_heads_tested']} heads {below['holm']} have p at most .05 after Holm, "
            f"{below['fdr']} after Benjamini-Hochberg"
        ],
    )
    rows = [
        [kind, side, f"{each['n']:.0f}", *_cells(each), number(each["effect_size"])]
        + [probability(each[name]) for name in ("p_value", "holm")]
        for side, kinds in found["chosen"].items()
        for kind, each in kinds.items()
    ]
    yield text_table(
        "lock_in in the layers and heads chosen on one half of the questions",
        ["what", "half", "pairs", "difference", "95% low", "95% high", "d_z", "p", "Holm p"],
        rows,
        [f"layers {found['chosen_layers']}; heads by layer {found['chosen_heads']}"],
    )


def _cells(each):
    return [number(each[name]) for name in ("difference", "low", "high")]
