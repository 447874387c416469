"""Agreement of scores: against scipy, on orders whose agreement is known, and over traces."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from stepflow_tl import step_knockout, step_saliency
from stepflow_tl.causal.agreement import score_maps, summarise_agreement, trace_agreement
from stepflow_tl.errors import ComparisonError
from stepflow_tl.saliency.baselines import baseline_maps
from stepflow_tl.trace import ReasoningTrace


@pytest.fixture
def lower():
    return np.tril(np.ones((8, 8), dtype=bool), -1)


def agreement(*args, **options):
    return trace_agreement(*args, **options)


def test_spearman_is_scipys_on_the_measured_pairs(lower):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 8, 8)).round(1)  # ties
    lower[5, 2] = False
    found = agreement({"a": a, "b": b}, lower).values["a", "b"]
    assert found["spearman"] == pytest.approx(spearmanr(a[lower], b[lower]).statistic)
    rows = [spearmanr(a[i][lower[i]], b[i][lower[i]]).statistic for i in range(3, 8)]
    assert found["row_spearman"] == pytest.approx(np.mean(rows))


def test_same_and_reversed_orders_are_one_and_minus_one(lower):
    a = np.random.default_rng(1).random((8, 8))
    found = agreement({"a": a, "same": np.exp(a), "reversed": -a}, lower, k=2)
    assert found.values["a", "same"] == {"spearman": 1, "row_spearman": 1, "top_k": 1}
    reverse = found.values["a", "reversed"]
    assert reverse["spearman"] == pytest.approx(-1) and reverse["row_spearman"] == pytest.approx(-1)
    # With 3 candidates two lists of 2 must share one; from 4 candidates on, opposite lists share none.
    assert reverse["top_k"] == pytest.approx((0.5 + 4 * 0) / 5)
    assert found.top_k_chance == pytest.approx(np.mean([2 / n for n in range(3, 8)]))
    assert found.n_pairs == 28


def test_random_orders_overlap_by_chance(lower):
    rng = np.random.default_rng(2)
    found = [agreement({"a": rng.random((8, 8)), "b": rng.random((8, 8))}, lower) for _ in range(300)]
    mean = np.mean([f.values["a", "b"]["top_k"] for f in found])
    assert mean == pytest.approx(found[0].top_k_chance, abs=0.03)


def test_what_does_not_exist_is_left_out_and_counted(lower):
    rng = np.random.default_rng(3)
    a, b = rng.random((2, 8, 8))
    traces = [agreement({"a": a, "b": a + s * b}, lower) for s in (0.1, 1, 5)]
    traces.append(agreement({"a": a, "b": np.ones((8, 8))}, lower))
    assert np.isnan(traces[-1].values["a", "b"]["spearman"])
    summary = summarise_agreement(traces)
    mean, low, high, n = summary.rows["a", "b"]["spearman"]
    values = [t.values["a", "b"]["spearman"] for t in traces[:3]]
    assert (
        n == 3 and mean == pytest.approx(np.mean(values)) and min(values) <= low < mean < high <= max(values)
    )
    assert "Agreement over 4 traces" in str(summary) and "a ~ b" in str(summary)
    one = summarise_agreement(traces[:1])
    assert np.isnan(one.rows["a", "b"]["spearman"][1]) and "[" not in str(one).splitlines()[5]
    assert one.to_json()["rows"][0]["low"] is None


@pytest.mark.parametrize(
    ("maps", "k", "said"),
    [({"a": np.ones((8, 8))}, 3, "got 1 maps"), ({"a": np.ones((8, 8)), "b": np.ones((8, 8))}, 0, "k=0")],
)
def test_too_little_to_compare_is_refused(maps, k, said, lower):
    with pytest.raises(ComparisonError, match=said):
        agreement(maps, lower, k=k)
    with pytest.raises(ComparisonError, match="0 pairs"):
        agreement({"a": maps["a"], "b": maps["a"]}, ~lower)


def test_summaries_of_nothing_or_of_different_maps_are_refused(lower):
    a = np.random.default_rng(4).random((8, 8))
    with pytest.raises(ComparisonError, match="0 traces cannot be summarised"):
        summarise_agreement([])
    with pytest.raises(ComparisonError, match="same maps and k"):
        summarise_agreement([agreement({"a": a, "b": a}, lower), agreement({"a": a, "c": a}, lower)])


def test_the_maps_of_a_trace_are_those_of_their_makers(bridges, tiny_trace):
    model = bridges("llama")
    saliency = step_saliency(model, tiny_trace, layers=[1, 3])
    knockout = step_knockout(model, tiny_trace)
    maps = score_maps(model, saliency, knockout)
    lengths = tiny_trace.step_lengths.numpy()
    counts = lengths[:, None] * lengths
    attention = baseline_maps(model, tiny_trace)["attention"][[1, 3]].mean((0, 1)).double().numpy()
    np.testing.assert_allclose(maps["attention"], attention / counts, rtol=1e-5)
    np.testing.assert_allclose(maps["knockout"], abs(knockout.effects.numpy()) / counts)
    np.testing.assert_allclose(maps["Step-Saliency"], saliency.head_mean().mean(0).double().numpy())
    assert maps["nearness"][4, 1] == -3
    assert (score_maps(model, saliency, knockout, signed=True)["knockout"] < 0).any()
    other = ReasoningTrace.from_parts(model.tokenizer, "Is 8 odd?", "No.\n\nIt is not.", "No.")
    with pytest.raises(ComparisonError, match="different traces"):
        score_maps(model, step_saliency(model, other), knockout)
