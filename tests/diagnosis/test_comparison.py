import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
from diagnostic_maps import make_diagnosis, random_saliency

from stepflow_tl import diagnosis
from stepflow_tl.diagnosis import LAYER_METRICS, diagnose
from stepflow_tl.errors import ComparisonError
from stepflow_tl.statistics.effects import corrected

FAST = dict(n_bootstrap=200, n_permutations=400)


def compare(*args, **options):
    return diagnosis.compare(*args, **{**FAST, **options})


def group(n, seed, *, shift=0.0, problems=None, n_layers=4):
    """n diagnoses with random lock-in; `shift` moves it, `problems` are offsets shared with another group."""
    rng = np.random.default_rng(seed)
    offsets = np.zeros(n) if problems is None else np.asarray(problems)
    found = []
    for i in range(n):
        lock_in = 0.4 + shift + offsets[i] + 0.05 * rng.normal(size=n_layers)
        metrics = {
            "lock_in": lock_in,
            "context_reach": 1 - lock_in,
            "self_share": 0.3 + 0.1 * rng.normal(size=n_layers),
        }
        found.append(make_diagnosis(metrics, decay_slope=float(rng.normal())))
    return found


def headline(comparison, metric):
    return next(effect for effect in comparison.headline if effect.metric == metric)


def test_a_planted_difference_is_found_with_its_sign_and_nothing_else_is():
    correct = [random_saliency("QTTTS", seed) for seed in range(25)]
    wrong = [random_saliency("QTTTS", 100 + seed, diagonal=0.4) for seed in range(25)]
    comparison = compare(correct, wrong, n_permutations=2000)
    lock_in = headline(comparison, "lock_in")
    assert (
        lock_in.difference < 0
        and lock_in.high < 0
        and lock_in.effect_size < -0.8
        and lock_in.p_corrected < 0.01
    )
    assert headline(comparison, "context_reach").difference == pytest.approx(-lock_in.difference)
    assert len(comparison.significant("lock_in")) == 4
    # Same diagonal on both sides of the ratio and no planted decay: these must stay quiet.
    assert headline(comparison, "decay_slope").p_corrected > 0.05
    assert not comparison.significant("template_share")


def test_swapping_the_groups_flips_the_signs():
    one, other = group(12, 0), group(15, 1, shift=0.03)
    there, back = compare(one, other), compare(other, one)
    for a, b in zip(there.by_layer, back.by_layer, strict=True):
        assert (a.mean, a.other_mean) == (b.other_mean, b.mean)
        assert a.difference == -b.difference and a.effect_size == pytest.approx(-b.effect_size)


@pytest.mark.parametrize("pair_by", [None, (range(10), range(10))])
def test_identical_groups_differ_by_nothing(pair_by):
    comparison = compare(group(10, 0), group(10, 0), pair_by=pair_by)
    for effect in (*comparison.headline, *comparison.by_layer):
        assert (
            effect.difference == 0 and effect.effect_size == 0 and effect.p_value == 1 == effect.p_corrected
        )
        assert effect.low <= 1e-12 and effect.high >= -1e-12


def test_pairing_finds_what_differences_between_problems_hide():
    problems = np.random.default_rng(9).normal(size=30)
    one, other = group(30, 0, problems=problems), group(30, 1, shift=0.05, problems=problems)
    ids = list(range(30))
    paired, unpaired = compare(one, other, pair_by=(ids, ids)), compare(one, other)
    assert headline(paired, "lock_in").p_corrected < 0.02 < 0.5 < headline(unpaired, "lock_in").p_value
    widths = [headline(c, "lock_in").high - headline(c, "lock_in").low for c in (paired, unpaired)]
    assert widths[0] < 0.2 * widths[1]


def test_traces_of_one_problem_are_averaged_before_pairing():
    values = {"a": [0.2, 0.4], "b": [0.5], "c": [0.9]}
    one = [make_diagnosis({"lock_in": [v]}) for vs in values.values() for v in vs]
    other = [make_diagnosis({"lock_in": [v]}) for v in (0.1, 0.2, 0.3)]
    comparison = compare(one, other, pair_by=(["a", "a", "b", "c"], ["b", "a", "z"]))
    effect = comparison.of("lock_in")[0]
    # Problem a: mean(.2, .4) against .2; problem b: .5 against .1; c and z have no partner.
    assert effect.n == 2 and effect.mean == pytest.approx(0.4) and effect.other_mean == pytest.approx(0.15)
    assert (comparison.pairing.n_pairs, comparison.pairing.n_dropped, comparison.pairing.n_averaged) == (
        2,
        2,
        1,
    )
    assert "paired over 2 problems (2 without a partner left out, 1 averaged over several traces)" in str(
        comparison
    )


def test_the_same_seed_gives_the_same_result_and_another_seed_another():
    one, other = group(30, 0), group(30, 1)
    first = compare(one, other, seed=3).to_json()
    assert compare(one, other, seed=3).to_json() == first
    different = compare(one, other, seed=4)
    assert different.by_layer[0].difference == first["by_layer"][0]["difference"]
    assert different.by_layer[0].low != first["by_layer"][0]["low"]


@pytest.mark.parametrize("paired", [False, True])
def test_the_order_of_the_traces_changes_nothing(paired):
    one, other = group(20, 0), group(20, 1)
    ids = [i % 15 for i in range(20)]
    pair_by = (ids, ids) if paired else None
    first = compare(one, other, pair_by=pair_by).to_json()
    order = list(range(20))
    random.Random(0).shuffle(order)
    assert order != sorted(order)
    shuffled_pairs = ([ids[i] for i in order], ids) if paired else None
    assert compare([one[i] for i in order], other, pair_by=shuffled_pairs).to_json() == first


def test_maps_and_their_diagnoses_give_the_same_comparison():
    one, other = ([random_saliency("QTTTS", seed) for seed in seeds] for seeds in (range(6), range(6, 11)))
    from_maps = compare(one, other, window=1, recent=2, pooling="sum")
    finished = [[diagnose(s, window=1, recent=2, pooling="sum") for s in maps] for maps in (one, other)]
    assert compare(*finished).to_json() == from_maps.to_json()
    assert compare(iter(one), iter(other), window=1, recent=2, pooling="sum").to_json() == from_maps.to_json()


def test_layers_are_corrected_within_a_metric_and_the_headline_within_itself():
    comparison = compare(group(20, 0), group(20, 1, shift=0.03), correction="holm")

    for metric in ("lock_in", "self_share"):
        of = comparison.of(metric)
        expected = corrected(np.array([effect.p_value for effect in of]), "holm")
        assert [effect.p_corrected for effect in of] == expected.tolist()
    expected = corrected(np.array([effect.p_value for effect in comparison.headline]), "holm")
    assert [effect.p_corrected for effect in comparison.headline] == expected.tolist()


def test_the_headline_averages_the_band_before_comparing():
    one = [make_diagnosis({"lock_in": [0.1 * i, 0.3, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]}) for i in range(3)]
    other = [make_diagnosis({"lock_in": [0.5, 0.5, 0, 0, 0, 0, 0, 0]}) for _ in range(3)]
    effect = headline(compare(one, other), "lock_in")
    assert effect.band == "shallow" and effect.layer is None
    assert effect.mean == pytest.approx(np.mean([0.15, 0.2, 0.25])) and effect.other_mean == pytest.approx(
        0.5
    )


def test_traces_without_a_summary_are_dropped_from_summary_metrics_only():
    one = [random_saliency("QTTTS", seed) for seed in range(5)] + [random_saliency("QTTT", 5)]
    other = [random_saliency("QTTTS", seed) for seed in range(10, 15)]
    comparison = compare(one, other)
    assert [effect.n for effect in comparison.of("lock_in")] == [6] * 4
    assert [effect.n for effect in comparison.of("thinking_share")] == [5] * 4
    assert "5" in str(comparison) and "6, 5" in str(comparison)


def test_a_metric_no_trace_has_is_blank_and_the_rest_stands():
    comparison = compare(
        [random_saliency("QTTT", seed) for seed in range(4)],
        [random_saliency("QTTT", seed) for seed in range(4, 8)],
    )
    effect = headline(comparison, "thinking_share")
    assert effect.n == 0 and math.isnan(effect.p_value) and math.isnan(effect.p_corrected)
    assert not math.isnan(headline(comparison, "lock_in").p_value)
    assert "-  fewer than 2 traces with a value in a group" in str(comparison)
    assert comparison.significant("thinking_share", level=1.0) == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_name": "other"},
            "trace 1 of group 'wrong' has model_name 'other', but trace 0 of group 'correct'",
        ),
        ({"objective": "response"}, "objective 'response'"),
        ({"n_layers": 9}, "n_layers 9"),
        ({"layers": (0, 1, 3), "n_layers": 4}, r"layers \(0, 1, 3\)"),
        ({"window": 2}, "window 2"),
        ({"recent": 3}, "recent 3"),
        ({"pooling": "sum"}, "pooling 'sum'"),
    ],
)
def test_traces_that_cannot_be_compared_are_named(changes, message):
    def plain(**options):
        return make_diagnosis({"lock_in": [0.1, 0.2, 0.3]}, **{"n_layers": 4, "layers": (0, 1, 2), **options})

    compare([plain(), plain()], [plain(), plain()])
    with pytest.raises(ComparisonError, match=message):
        compare([plain(), plain()], [plain(), plain(**changes)])


def test_groups_that_are_too_small_are_refused_by_name():
    with pytest.raises(ComparisonError, match="group 'wrong' is empty"):
        compare(group(3, 0), [])
    with pytest.raises(ComparisonError, match="group 'b' has 1 trace"):
        compare(group(3, 0), group(1, 1), names=("a", "b"))


@pytest.mark.parametrize(
    ("pair_by", "message"),
    [
        (([1, 2], [1, 2, 3]), "pair_by gives 2 ids for the 3 traces of group 'correct'"),
        ((["a", "b", "c"], ["x", "y", "z"]), "no problem id is in both groups .*'a'.*'x'.*ids of problems"),
        (
            (["a", "b", "c"], ["a", "y", "z"]),
            r"pair_by leaves 1 problem .*\(4 have no partner\).* at least 2",
        ),
        (([1, None, 3], [1, 2, 3]), "None among the ids of group 'correct'"),
    ],
)
def test_pairing_that_cannot_work_is_refused(pair_by, message):
    with pytest.raises(ComparisonError, match=message):
        compare(group(3, 0), group(3, 1), pair_by=pair_by)


def test_something_else_in_a_group_is_named():
    with pytest.raises(
        ComparisonError, match="item 1 of group 'correct' is a str: expected StepSaliency or Diagnosis"
    ):
        compare(iter([*group(1, 0), "map.safetensors"]), group(2, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confidence": 95.0}, "confidence is 95.0: expected a level between 0 and 1"),
        ({"n_bootstrap": 0}, "n_bootstrap is 0"),
        ({"n_permutations": 0}, "n_permutations 0"),
    ],
)
def test_levels_and_counts_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        compare(group(3, 0), group(3, 1), **options)


def test_an_unknown_metric_is_refused_with_the_known_ones():
    comparison = compare(group(3, 0), group(3, 1))
    with pytest.raises(
        ComparisonError, match="no metric 'lockin' in this comparison: expected one of lock_in"
    ):
        comparison.significant("lockin")
    assert comparison.of("decay_slope") == (comparison.headline[-1],)


def test_tables_say_who_how_and_what_was_corrected():
    comparison = compare(group(5, 0), group(6, 1), names=("right_ones", "wrong_ones"), correction="fdr_bh")
    lines = str(comparison).splitlines()
    assert lines[0] == "right_ones (5 traces) minus wrong_ones (6 traces): tiny, objective per_token"
    assert any("Hedges" in line for line in lines[:4]) and "right_ones" in lines[3]
    assert [line.split()[1] for line in lines[5:10]] == [
        "lock_in", "context_reach", "thinking_share", "self_share", "recency",
    ]  # fmt: skip
    assert "p corrected over the headline numbers: fdr_bh" in str(comparison)
    assert "thinking steps per trace: right_ones 4.00, wrong_ones 4.00" in str(comparison)
    assert max(map(len, lines)) <= 130
    assert "layer 3" in comparison.table(
        "lock_in"
    ) and "corrected over a metric's layers" in comparison.table("lock_in")
    assert comparison.full_table().count("layer 2") == 10
    assert "d_z" in str(compare(group(3, 0), group(3, 1), pair_by=("abc", "abc")))


def test_the_notebook_view_escapes_group_names():
    html = compare(group(3, 0), group(3, 1), names=("<i>a", "b&c"))._repr_html_()
    assert "<i>" not in html and "&lt;i&gt;a" in html and "b&amp;c" in html
    assert html.count("<tr>") == 7


def test_data_frames_hold_every_effect():
    comparison = compare(group(3, 0), group(4, 1))
    frame = comparison.to_dataframe()
    assert list(frame.columns) == [
        "metric", "layer", "n", "other_n", "mean", "other_mean", "difference", "low", "high", "effect_size",
        "p_value", "p_corrected",
    ]  # fmt: skip
    assert len(frame) == 4 * len(LAYER_METRICS)
    short = comparison.to_dataframe("headline")
    assert short["band"].tolist()[:5] == ["shallow", "shallow", "deep", "deep", "deep"] and len(short) == 6


def test_json_is_plain():
    comparison = compare(group(3, 0), group(4, 1))
    data = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert data["headline"][0]["metric"] == "lock_in" and data["resampling"]["seed"] == 0


def test_importing_the_diagnostics_loads_neither_scipy_nor_pandas():
    heavy = ("scipy", "pandas", "transformers", "transformer_lens")
    script = f"import sys, stepflow_tl.diagnosis; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
