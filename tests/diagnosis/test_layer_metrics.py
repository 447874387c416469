"""Every metric against numbers worked out by hand, the laws that hold for any map, and the one table."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diagnostic_maps import make_saliency, random_saliency
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflow_tl.diagnosis import (
    HEADLINE,
    LAYER_METRICS,
    Diagnosis,
    LayerMetric,
    compare,
    diagnose,
    row_shares,
)
from stepflow_tl.diagnosis.layer_metrics import decay_slope
from stepflow_tl.diagnosis.shares import MapShares

# Mean-pooled map of Q T1 T2 T3 S1 S2. Row sums: 4, 4, 4, 8, 10, 4.
SEGMENTS, LENGTHS = "QTTTSS", (2, 1, 2, 1, 1, 2)
MAP = torch.tensor(
    [
        [4, 0, 0, 0, 0, 0],
        [1, 3, 0, 0, 0, 0],
        [2, 1, 1, 0, 0, 0],
        [1, 0, 3, 4, 0, 0],
        [1, 1, 2, 4, 2, 0],
        [0, 1, 1, 0, 1, 1],
    ],
    dtype=torch.float64,
)


def by_hand(**options):
    """The map above in one layer and two heads whose mean it is."""
    return make_saliency(SEGMENTS, MAP[None], lengths=LENGTHS, head_gains=(1.5, 0.5), **options)


def values(name, saliency, **options):
    return LAYER_METRICS[name].values(MapShares.of(saliency, **options))


def value(name, saliency, **options):
    return float(values(name, saliency, **options)[0])


def test_rows_are_divided_by_their_sums():
    shares = row_shares(by_hand())
    expected = MAP / torch.tensor([4, 4, 4, 8, 10, 4], dtype=torch.float64)[:, None]
    torch.testing.assert_close(shares[0], expected)


def test_sum_pooling_weighs_steps_by_their_mass():
    # Row T1, one token: entries 1 and 3 stand for 2 x 1 and 1 x 1 token pairs, so the masses are 2 and 3.
    shares = row_shares(by_hand(), pooling="sum")
    torch.testing.assert_close(shares[0, 1, :2], torch.tensor([0.4, 0.6], dtype=torch.float64))


def test_lock_in_averages_the_diagonal_from_the_second_thinking_step():
    assert value("lock_in", by_hand()) == pytest.approx((1 / 4 + 4 / 8) / 2)


def test_the_window_adds_earlier_thinking_steps_but_never_the_question():
    # Window 1: T2 gets T1 and itself, T3 gets T2 and itself. Window 9: all thinking, still not the question.
    assert value("lock_in", by_hand(), window=1) == pytest.approx((2 / 4 + 7 / 8) / 2)
    assert value("lock_in", by_hand(), window=9) == pytest.approx(1 - value("question_share", by_hand()))


def test_context_reach_is_what_lock_in_leaves():
    assert value("context_reach", by_hand()) == pytest.approx((3 / 4 + 4 / 8) / 2)
    assert value("context_reach", by_hand(), window=1) == pytest.approx((2 / 4 + 1 / 8) / 2)


def test_question_share_averages_over_the_rows_of_lock_in():
    assert value("question_share", by_hand()) == pytest.approx((2 / 4 + 1 / 8) / 2)


def test_thinking_share_and_self_share_average_over_summary_steps():
    assert value("thinking_share", by_hand()) == pytest.approx((7 / 10 + 2 / 4) / 2)
    assert value("self_share", by_hand()) == pytest.approx((2 / 10 + 2 / 4) / 2)


def test_recency_is_the_part_of_the_thinking_mass_on_the_last_steps():
    assert value("recency", by_hand(), recent=1) == pytest.approx((4 / 10 + 0) / (7 / 10 + 2 / 4))
    assert value("recency", by_hand(), recent=2) == pytest.approx((6 / 10 + 1 / 4) / (7 / 10 + 2 / 4))


def test_template_share_is_mass_relative_to_all_mass_of_the_row():
    # Masses of rows T1..S2, from map entries times step lengths: 5, 14, 12, 13, 12.
    template = torch.tensor([0.0, 5, 14, 4, 0, 36], dtype=torch.float64)
    saliency = by_hand(template_sums=torch.stack([1.5 * template, 0.5 * template])[None])
    expected = (1 / 2 + 1 / 2 + 4 / 16 + 0 + 36 / 48) / 5
    assert value("template_share", saliency) == pytest.approx(expected)


def test_the_authors_blocks_are_means_of_whole_squares():
    assert value("final_block", by_hand()) == pytest.approx((2 + 0 + 1 + 1) / 4)
    assert value("analysis_block", by_hand()) == pytest.approx((3 + 1 + 1 + 0 + 3 + 4) / 9)
    assert value("block_ratio", by_hand()) == pytest.approx(1 / (12 / 9))


def test_decay_slope_is_per_layer_of_the_model_even_if_layers_are_missing():
    share = torch.tensor([0.1, 0.9, 0.8, 0.6, 0.4, 0.2], dtype=torch.float64)
    # Six stored layers of eight: the deep half starts at layer 4, and the rest must not count.
    assert float(decay_slope(share, (0, 1, 4, 5, 6, 7), 8)) == pytest.approx(-0.2)
    assert float(decay_slope(share[[2, 4]], (4, 6), 8)) == pytest.approx(-0.2)
    assert float(decay_slope(share[[5, 3]], (7, 5), 8)) == pytest.approx(-0.2)


def test_decay_slope_is_the_least_squares_line_and_skips_layers_without_a_value():
    share = torch.tensor([0.5, 0.5, 0.3, math.nan, 0.4], dtype=torch.float64)
    # x = 0, 1, 2, 4: mean 1.75, centred -1.75, -.75, .25, 2.25; sum of squares 8.75.
    expected = (-1.75 * 0.5 - 0.75 * 0.5 + 0.25 * 0.3 + 2.25 * 0.4) / 8.75
    layers = tuple(range(6, 11))
    assert float(decay_slope(share, layers, 12)) == pytest.approx(expected)


def test_decay_slope_of_fewer_than_two_deep_layers_does_not_exist():
    share = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    assert math.isnan(float(decay_slope(share, (0, 1, 4), 8)))


def test_a_row_without_mass_stays_zero_and_is_left_out_of_the_means():
    emptied = MAP.clone()
    emptied[2] = 0
    saliency = make_saliency(SEGMENTS, emptied[None], lengths=LENGTHS)
    rows = MapShares.of(saliency)
    assert rows.shares[0, 2].tolist() == [0] * 6
    assert value("lock_in", saliency) == pytest.approx(4 / 8)
    assert rows.rows_without_mass.tolist() == [1]


def test_rows_of_denormal_mass_still_sum_to_one():
    shares = row_shares(make_saliency("QTT", 1e-320 * torch.ones(1, 3, 3).double().tril()))
    torch.testing.assert_close(shares[0, 2], torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "segments", "options"),
    [
        ("lock_in", "QTS", {}),
        ("context_reach", "QTS", {}),
        ("question_share", "TTS", {}),
        ("question_share", "QTS", {}),
        ("thinking_share", "QTT", {}),
        ("thinking_share", "QSS", {}),
        ("self_share", "QTT", {}),
        ("recency", "QTT", {"recent": 1}),
        ("recency", "QTTS", {"recent": 2}),
    ],
)
def test_a_definition_without_rows_gives_nan(name, segments, options):
    assert math.isnan(value(name, random_saliency(segments, 0), **options))


def test_metrics_per_head_are_those_of_each_head_alone():
    maps = torch.rand(3, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tril()
    heads = [make_saliency(SEGMENTS, maps[:, head], lengths=LENGTHS) for head in range(2)]
    both = replace(
        heads[0],
        sums=torch.cat([head.sums for head in heads], dim=1),
        template_sums=torch.cat([head.template_sums for head in heads], dim=1),
    )
    for name in LAYER_METRICS:
        per_head = values(name, both, per_head=True)
        alone = torch.stack([values(name, head) for head in heads], dim=1)
        torch.testing.assert_close(per_head, alone)
    slopes = decay_slope(values("thinking_share", both, per_head=True), (1, 2, 3), 4)
    one = decay_slope(values("thinking_share", heads[1]), (1, 2, 3), 4)
    torch.testing.assert_close(slopes[1], one)


@st.composite
def recipes(draw):
    """Any make-up of a trace, ragged steps, several heads, with rows that may be empty.

    Plain data: beartype draws random numbers when the map is built, which a strategy must not do.
    """
    segments = (
        draw(st.sampled_from(["", "Q", "QQ"])) + "T" * draw(st.integers(0, 5)) + "S" * draw(st.integers(0, 3))
    )
    segments = segments or "T"
    per_step = {"min_size": len(segments), "max_size": len(segments)}
    return {
        "segments": segments,
        "lengths": draw(st.lists(st.integers(1, 4), **per_step)),
        "empty": draw(st.lists(st.booleans(), **per_step)),
        "head_gains": draw(st.lists(st.floats(0.1, 10), min_size=1, max_size=3)),
        "seed": draw(st.integers(0, 2**31)),
    }


def cook(recipe):
    n = len(recipe["segments"])
    maps = torch.rand(
        2, n, n, generator=torch.Generator().manual_seed(recipe["seed"]), dtype=torch.float64
    ).tril()
    maps[:, torch.tensor(recipe["empty"])] = 0
    options = {name: recipe[name] for name in ("lengths", "head_gains")}
    return make_saliency(recipe["segments"], maps, n_layers=4, layers=(1, 3), **options)


def all_values(saliency):
    """Every scale-free number of a map, as one vector."""
    rows = MapShares.of(saliency)
    scale_free = [name for name in LAYER_METRICS if name not in ("final_block", "analysis_block")]
    columns = [LAYER_METRICS[name].values(rows) for name in scale_free]
    return torch.cat([*columns, rows.rows_without_mass.double()])


@settings(max_examples=200)
@given(recipes(), st.sampled_from(["mean", "causal_mean", "sum"]))
def test_shares_of_a_row_sum_to_one_or_to_nothing(recipe, pooling):
    saliency = cook(recipe)
    shares = row_shares(saliency, pooling=pooling)
    totals = shares.sum(-1)
    has_mass = saliency.head_mean("sum").sum(-1) > 0
    torch.testing.assert_close(totals, has_mass.double())
    assert (shares >= 0).all() and (shares.triu(diagonal=1) == 0).all()


@settings(max_examples=200)
@given(recipes(), st.integers(0, 6))
def test_lock_in_and_context_reach_sum_to_one_for_every_window(recipe, window):
    saliency = cook(recipe)
    lock_in = values("lock_in", saliency, window=window)
    total = lock_in + values("context_reach", saliency, window=window)
    torch.testing.assert_close(total[~lock_in.isnan()], torch.ones_like(total[~lock_in.isnan()]))
    assert total.isnan().equal(lock_in.isnan())


@settings(max_examples=200)
@given(recipes())
def test_question_thinking_and_self_share_of_the_summary_sum_to_one(recipe):
    saliency = cook(recipe)
    shares, segments = row_shares(saliency), MapShares.of(saliency).segments
    on_question = shares[..., segments == 1].sum(-1)
    rows = (segments == 3) & (shares.sum(-1) > 0)
    question = (on_question * rows).sum(-1) / rows.sum(-1)
    total = values("thinking_share", saliency) + values("self_share", saliency) + question
    torch.testing.assert_close(total[~total.isnan()], torch.ones_like(total[~total.isnan()]))


@settings(max_examples=200)
@given(recipes(), st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=2))
def test_scaling_each_layer_changes_no_share(recipe, gains):
    saliency = cook(recipe)
    gain = torch.tensor(gains, dtype=torch.float64)
    scaled = replace(
        saliency,
        sums=saliency.sums * gain[:, None, None, None],
        template_sums=saliency.template_sums * gain[:, None, None],
    )
    torch.testing.assert_close(
        all_values(scaled), all_values(saliency), rtol=1e-9, atol=1e-12, equal_nan=True
    )


@settings(max_examples=200)
@given(recipes(), st.randoms(use_true_random=False))
def test_the_order_of_heads_changes_nothing(recipe, random):
    saliency = cook(recipe)
    order = list(range(saliency.n_heads))
    random.shuffle(order)
    shuffled = replace(saliency, sums=saliency.sums[:, order], template_sums=saliency.template_sums[:, order])
    torch.testing.assert_close(
        all_values(shuffled), all_values(saliency), rtol=1e-9, atol=1e-12, equal_nan=True
    )


def test_a_new_metric_is_one_entry_of_the_table(monkeypatch):
    one, other = ([random_saliency("QTTS", seed) for seed in seeds] for seeds in (range(3), range(3, 7)))
    before = json.loads(json.dumps(diagnose(one[0]).to_json()))
    entry = LayerMetric(
        "first_row",
        lambda rows: rows.shares[:, 0, 0] * rows.window,
        needs=(lambda rows: "" if rows.window else "needs a window",),
        label="of the first step",
        definition="$P_{00}$",
    )
    monkeypatch.setitem(LAYER_METRICS, "first_row", entry)
    found = diagnose(one[0], window=2)
    assert found.first_row.tolist() == [2] * 4 and found.band("deep")["first_row"] == 2
    assert str(found).splitlines()[2].split()[-1] == "first"
    assert found.to_dataframe()["first_row"].tolist() == [2] * 4
    assert Diagnosis.from_json(found.to_json()).to_json() == found.to_json()
    assert [effect.mean for effect in compare(one, other, window=2).of("first_row")] == [2] * 4
    # What was stored before the metric existed reads as NaN there, and says so.
    old = Diagnosis.from_json(before)
    assert old.first_row.isnan().all() and "written before" in old.reasons["first_row"]
    assert torch.equal(old.lock_in, diagnose(one[0]).lock_in)


def test_the_headline_is_what_the_table_predicts_a_direction_for():
    assert HEADLINE == (
        ("lock_in", "shallow"), ("context_reach", "shallow"), ("thinking_share", "deep"),
        ("self_share", "deep"), ("recency", "deep"), ("decay_slope", None),
    )  # fmt: skip
    assert {name: metric.direction for name, metric in LAYER_METRICS.items() if metric.direction} == {
        "lock_in": 1, "context_reach": -1, "thinking_share": -1, "self_share": 1, "recency": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match="'lock_in' has band None and direction 1: expected both"):
        replace(LAYER_METRICS["lock_in"], band=None)


def test_the_method_page_has_the_definitions_of_the_table():
    page = Path(__file__).parents[2] / "docs" / "method.md"
    table = page.read_text("utf-8").split("| metric, per layer |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", table, flags=re.MULTILINE)
    assert rows == [(metric.name, metric.definition) for metric in LAYER_METRICS.values()]
