"""Right against wrong within questions, against slow loops; what is planted is found, what is not is not."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from diagnostic_maps import random_saliency
from within_questions import (
    analyse,
    differences,
    halves,
    head_lock_in,
    in_words,
    most_negative,
    tables,
    without_length,
)

from stepflow_tl.diagnosis import compare, diagnose

N_LAYERS, N_HEADS = 4, 5


def traces():
    """The first 20 of 24 questions have two right answers and a wrong one, the others a right one."""
    pool = [diagnose(random_saliency("QTTTT"[: 3 + seed % 3] + "SS", seed)) for seed in range(17)]
    return [
        SimpleNamespace(diagnosis=pool[(3 * i + sample) % len(pool)], pair=f"q{i}", group=right)
        for i in range(24)
        for sample, right in enumerate([True, True, False] if i < 20 else [True])
    ]


def test_differences_are_those_of_a_loop_over_questions():
    rng, rows = np.random.default_rng(0), traces()
    values = rng.normal(size=(len(rows), 3))
    values[0, 0] = math.nan  # a right answer without this number: the other one is left
    values[2, 1] = math.nan  # the only wrong answer without it: no difference
    names, d = differences(values, [row.pair for row in rows], [row.group for row in rows])
    assert names == sorted(f"q{i}" for i in range(20))
    for name, own in zip(names, d, strict=True):
        for column in range(3):
            means = []
            for side in (True, False):
                kept = [
                    v[column]
                    for row, v in zip(rows, values, strict=True)
                    if row.pair == name and row.group is side and not math.isnan(v[column])
                ]
                means.append(sum(kept) / len(kept) if kept else math.nan)
            assert own[column] == pytest.approx(means[0] - means[1], abs=1e-12, nan_ok=True)
    assert np.isnan(d).sum() == 1


def test_a_difference_of_length_alone_is_gone_at_equal_length_and_a_true_one_stays():
    rng = np.random.default_rng(1)
    x = rng.normal(0.5, 1, size=(40, 2))  # right answers are longer
    noise = rng.normal(0, 0.1, size=40)
    length = x @ [0.3, -0.2] + noise
    a, low, high, p = without_length(length, x, seed=0, draws=2000)
    assert length.mean() > 0.02 and low < 0 < high and p > 0.05
    shifted, low, high, p = without_length(length - 0.2, x, seed=0, draws=2000)
    assert shifted == pytest.approx(a - 0.2, abs=1e-10) and high < 0 and p < 0.01


def test_the_intercept_and_its_p_value_are_those_of_least_squares_on_every_exchange():
    rng = np.random.default_rng(2)
    x, d = rng.normal(size=(6, 2)), rng.normal(0.8, 1, size=6)

    def intercept(signs):
        design = np.column_stack([np.ones(6), signs[:, None] * x])
        return np.linalg.lstsq(design, signs * d, rcond=None)[0][0]

    a, *_, p = without_length(d, x, seed=0, draws=20_000)
    assert a == pytest.approx(intercept(np.ones(6)), abs=1e-10)
    all_signs = (np.array([float(bit) for bit in f"{code:06b}"]) * 2 - 1 for code in range(64))
    exact = np.mean([abs(intercept(signs)) >= abs(a) * (1 - 1e-9) for signs in all_signs])
    assert p == pytest.approx(exact, abs=0.02) and 0 < exact < 1


def test_halves_depend_on_names_alone_and_the_most_negative_columns_are_taken():
    names = [f"q{i}" for i in range(21)]
    first = dict(zip(names, halves(names, 0), strict=True))
    assert sum(first.values()) == 11 and first == dict(zip(names[::-1], halves(names[::-1], 0), strict=True))
    assert list(first.values()) != list(halves(names, 1))
    d = np.random.default_rng(3).normal(size=(30, 5)) + [0, -2, 0, 3, -1]
    d[5] = math.nan  # a pair without a value
    assert most_negative(d, 2) == [1, 4]


def test_a_planted_head_is_found_on_one_half_and_holds_on_the_other():
    rows, rng = traces(), np.random.default_rng(4)
    heads = rng.normal(0.5, 0.05, size=(len(rows), N_LAYERS, N_HEADS))
    heads[[not row.group for row in rows], 2, 3] += 0.3
    found = analyse(rows, heads, seed=0)
    first = found["heads"][0]
    assert (first["layer"], first["head"], first["n"]) == (2, 3, 20) and first["holm"] < 0.01
    assert first["difference"] == pytest.approx(-0.3, abs=0.05) and found["heads_below"]["holm"] == 1
    assert 3 in found["chosen_heads"]["2"] and sum(map(len, found["chosen_heads"].values())) == 12
    tested = found["chosen"]["tested on"]
    assert tested["heads"]["n"] == tested["layers"]["n"] == 10 and tested["heads"]["holm"] < 0.01
    assert tested["layers"]["holm"] > 0.05  # nothing is planted in the diagnoses
    assert found["at equal length"]["lock_in shallow"]["n"] == 20
    text = "\n".join(tables(found))
    assert "  2.3  " in text and "of 20 heads 1 have" in text
    sides = [[row for row in rows if row.group is side] for side in (True, False)]
    ids = tuple([row.pair for row in side] for side in sides)
    comparison = compare(
        *([row.diagnosis for row in side] for side in sides), pair_by=ids, n_bootstrap=99, n_permutations=999
    )
    first, *others = in_words(
        found | {"comparison": comparison.to_json(), "matched": None, "is_interim": True}
    )
    assert "is not shown within the question" in first and "n 20" in first and len(others) == 6
    assert any("of 20 heads 1 differ after Holm" in line for line in others)


@pytest.mark.parametrize(
    ("plain", "alike", "is_interim", "verdict"),
    [
        ((-0.03, 0.01), (-0.02, -0.01, 0.01), False, "stands within the question, at equal length too"),
        ((-0.03, 0.01), (-0.02, 0.01, 0.2), False, "stands within the question, but length may be"),
        ((-0.03, 0.2), (-0.02, -0.01, 0.01), False, "is not shown"),
        ((0.03, 0.01), (0.02, 0.03, 0.01), False, "is higher in right answers"),
        (
            (-0.03, 0.01),
            (-0.02, -0.01, 0.01),
            True,
            "**Interim look, level 0.001: Lower lock-in in right answers is not",
        ),
        ((-0.03, 0.0005), (-0.02, -0.01, 0.001), True, "at equal length too"),
    ],
)
def test_the_verdict_is_that_of_the_plan(plain, alike, is_interim, verdict):
    nothing = dict(low=-0.05, high=-0.02, p_value=1.0, p_corrected=1.0, effect_size=0.0, n=40)
    primary = dict(nothing, metric="lock_in", band="shallow", difference=plain[0], p_value=plain[1])
    found = {
        "comparison": {"headline": [primary], "by_layer": []},
        "at equal length": {
            "lock_in shallow": dict(difference=alike[0], low=-0.1, high=alike[1], p_value=alike[2])
        },
        "heads_below": {"holm": 0, "fdr": 0},
        "n_heads_tested": 20,
        "chosen": {"tested on": {}},
        "matched": None,
        "is_interim": is_interim,
    }
    first = next(in_words(found))
    assert verdict in first and "holds the earlier -0.0225" in first


def test_lock_in_of_a_head_is_that_of_its_own_map(tmp_path):
    saliency = random_saliency("QTTTS", 0, head_gains=(1.0, 5.0))
    saliency.save(tmp_path / "map.safetensors")
    found = head_lock_in(tmp_path / "map.safetensors")
    assert found.shape == (N_LAYERS, 2)
    assert found[:, 1] == pytest.approx(diagnose(saliency).lock_in.numpy())  # a gain is not a share
