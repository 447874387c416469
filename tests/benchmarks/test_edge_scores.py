"""Metrics of edges against loops, chains of steps against explicit paths, weights put back."""

import itertools

import numpy as np
import pytest
import torch
from edge_scores import equally_far, far_comparisons, in_rows, influence, judged_rows, randomised, row_metrics
from edge_tasks import edge_row, reached
from made_maps import make_knockout, make_saliency

from stepflow_tl.testbed.edges import EdgeRow


def compare(value, other):
    return 1.0 if value > other else 0.5 if value == other else 0.0


def slow_metrics(row, step_map):
    pairs, near = [], []
    needed = [k for k, is_needed in zip(row.candidates, row.needed, strict=True) if is_needed]
    idle = [k for k in row.candidates if k not in needed]
    for source in needed:
        own = step_map[row.query, source]
        pairs += [compare(own, step_map[row.query, other]) for other in idle]
        smallest = min(abs(other - source) for other in idle)
        close = [compare(own, step_map[row.query, o]) for o in idle if abs(o - source) == smallest]
        near.append(sum(close) / len(close))
    best = max(step_map[row.query, k] for k in row.candidates)
    tops = [k in needed for k in row.candidates if step_map[row.query, k] == best]
    return [np.mean(pairs), np.mean(near), np.mean(tops)]


def drawn_rows(rng, sizes=range(2, 9)):
    drawn = [EdgeRow(q, tuple(range(q)), rng.random(q) < 0.4) for q in sizes]
    return [row for row in drawn if row.needed.any() and not row.needed.all()]


@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_those_of_a_loop(seed):
    rng = np.random.default_rng(seed)
    step_map = rng.normal(size=(9, 9)).round(0 if seed % 2 else 6)  # with ties and without
    rows = drawn_rows(rng)
    assert len(rows) > 3
    for row in rows:
        np.testing.assert_allclose(row_metrics(row, step_map), slow_metrics(row, step_map))


def test_equally_far_counts_every_pair_of_rows_at_one_distance():
    step_map = np.zeros((5, 5))
    step_map[4, 3], step_map[3, 2], step_map[2, 1] = 3, 2, 1
    first, second = (
        EdgeRow(4, (0, 3), np.array([False, True])),
        EdgeRow(3, (0, 1, 2), np.array([True, False, False])),
    )
    third = EdgeRow(2, (0, 1), np.array([False, True]))
    # At distance 1: 4 <- 3 is needed and above 3 <- 2, 2 <- 1 is needed and below it. Weights are equal.
    assert equally_far([first, second, third], step_map) == pytest.approx(0.5)
    assert equally_far([first, second], step_map) == 1.0
    assert np.isnan(equally_far([first, third], step_map))


@pytest.mark.parametrize("seed", range(3))
def test_equally_far_is_fair_to_rows_of_any_size(seed):
    # Two rows whose shares say nothing but how short the row is, and every way to draw the needed ones.
    rng = np.random.default_rng(seed)
    step_map = np.zeros((9, 9))
    step_map[2, :2], step_map[6, :6] = rng.random(2) + 1, rng.random(6)
    counts, plain = [], []
    for short, long in itertools.product(range(2), itertools.combinations(range(6), 2)):
        rows = [EdgeRow(q, tuple(range(q)), np.isin(range(q), own)) for q, own in ((2, short), (6, long))]
        counts.append(far_comparisons(rows, step_map))
        plain.append(counts[-1][0] / counts[-1][1] if counts[-1][1] else np.nan)
    hits, total = np.sum(counts, axis=0)
    assert hits / total == pytest.approx(0.5) and np.nanmean(plain) > 0.6


def test_order_alone_is_at_chance_among_the_equally_far():
    rng = np.random.default_rng(0)
    nearness = -np.abs(np.subtract.outer(np.arange(12), np.arange(12))).astype(float)
    rows = [edge_row({(q, q - 1)}, q, range(12)) for q in range(3, 12)]
    assert all(row_metrics(row, nearness)[1] == 1 for row in rows)  # what `near` leaves to order alone
    rows += drawn_rows(rng, range(3, 12))
    assert equally_far(rows, nearness) == pytest.approx(0.5)


@pytest.mark.parametrize("ends", [0, 2])
def test_influence_is_the_sum_over_all_paths(ends):
    rng = np.random.default_rng(1)
    n = 7
    weights = np.where(rng.random((n, n)) < 0.8, rng.normal(size=(n, n)) + 0.7, 0)
    walk = in_rows(np.tril(weights.clip(0), -1))
    walk[:ends] = 0
    expected = np.zeros((n, n))
    for i, j in itertools.combinations(range(n - 1, -1, -1), 2):
        between = range(j + 1, i)
        for size in range(len(between) + 1):
            for path in itertools.combinations(between, size):
                stops = [i, *path[::-1], j]
                expected[i, j] += np.prod([walk[a, b] for a, b in itertools.pairwise(stops)])
    found = influence(weights, ends=ends)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert (weights < 0).any() and found.max() <= 1 + 1e-12


def test_every_walk_ends_in_the_question():
    found = influence(np.random.default_rng(2).random((8, 8)), ends=3)
    np.testing.assert_allclose(found[3:, :3].sum(-1), 1)


def test_what_a_step_hangs_on_is_followed_through_all_steps():
    edges = {(5, 3), (3, 1), (4, 2), (1, 0)}
    assert reached(edges, 5) == {3, 1, 0} and reached(edges, 4) == {2} and reached(edges, 0) == frozenset()


def test_rows_by_knockout_need_what_costs_half_a_nat():
    saliency = make_saliency(3, 1)
    effects = torch.zeros(5, 5, dtype=torch.float64)
    effects[3, 0], effects[3, 1], effects[4, :4] = 0.5, 0.49, 1.0
    (row,) = judged_rows(make_knockout(saliency, effects=effects))
    assert row.query == 3 and row.candidates == (0, 1, 2) and row.needed.tolist() == [True, False, False]


def test_random_weights_are_others_and_then_the_old_ones(tiny_model):
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    last = model.cfg.n_layers - 1
    with pytest.raises(KeyError, match="stop"), randomised(model, [last]):
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        own = {id(p) for p in model.blocks[last].parameters()}
        assert changed and {id(p) for name, p in model.named_parameters() if name in changed} <= own
        raise KeyError("stop")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
