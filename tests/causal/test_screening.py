"""Screened and joint cuts: equal to all pairs where both measure, complete, disjoint; what hides is found."""

import math

import pytest
import torch
from causal.knockout_oracle import all_effects, effect
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TINY_MODEL_KINDS

from stepflow_tl import StepFlow, errors, step_knockout, step_saliency
from stepflow_tl.causal.cut import CutEffect
from stepflow_tl.causal.screening import promise, promise_order, screen
from stepflow_tl.models import prefix_cache

EXACT = dict(rtol=0, atol=1e-8)
# GQA everywhere; besides it: windows, windows and soft-capped scores, windows and sinks.
ARCHITECTURES = ("llama", "mistral", "gemma2", "gpt_oss")
SMALL = dict(pairs="screened", top=1)


@pytest.fixture(scope="module")
def long_trace(make_trace):
    """Ten steps: a question, eight of thinking, one of summary."""
    thinking = ["7 = 2*3 + 1", "So yes", "3*4 is 12", "Odd", "12 + 2 is 14", "No: 15", "Is it 7?", "So 7"]
    return make_trace(".\n\n".join(thinking) + ".", "Odd, yes.")


def candidate_sets(found):
    """The sets that stand for the pairs of each query: those cut alone, and those of bounding groups."""
    n = len(found.labels)
    sets = {query: [{key} for key in range(query) if found.measured[query, key]] for query in range(n)}
    for group in found.groups:
        if group.role == "bound":
            sets[group.query].append(set(group.keys))
    return sets


# --- the search ---------------------------------------------------------------------------------------------


@given(data=st.data(), n=st.integers(0, 24), top=st.integers(1, 26), tolerance=st.floats(0, 2))
def test_cut_alone_and_in_groups_are_all_candidates_once(data, n, top, tolerance):
    candidates = data.draw(st.permutations(range(n)))
    values = data.draw(st.lists(st.floats(-3, 3), min_size=n, max_size=n))
    joint = [tuple(range(n))] if n > 1 else []
    rounds = []

    def cuts(key_sets):
        rounds.append(list(key_sets))
        own = [[values[key] for key in keys] for keys in key_sets]
        return [CutEffect(sum(each), sum(map(abs, each))) for each in own]

    found = screen(30, candidates, cuts, top=top, tolerance=tolerance, joint=joint)
    bounding = [group for group in found.groups if group.role == "bound"]
    members = sorted([*found.alone, *(key for group in bounding for key in group.keys)])
    assert members == list(range(n)), "disjoint and complete"
    assert set(candidates[:top]) <= set(found.alone) and len(bounding) <= 1
    assert all(value == values[key] for key, value in found.alone.items())
    for group in bounding:
        assert all(abs(values[key]) <= group.size + 1e-9 for key in group.keys), "what adds up is bounded"
        last = candidates[len(found.alone) - top : len(found.alone)]
        assert group.size <= tolerance or all(abs(values[key]) <= tolerance for key in last)
    assert sum(map(len, rounds)) == len(found.alone) + len(found.groups)
    assert len(rounds) <= 2 + math.ceil(n / top)
    assert [group.keys for group in found.groups if group.role == "joint"] == joint


def test_rounds_go_on_while_they_find_something_and_something_is_left():
    asked, loud = [], {3, 8, 5}

    def cuts(key_sets):
        asked.append(list(key_sets))
        return [CutEffect(0.0, float(len(loud & set(keys)))) for keys in key_sets]

    def effects(key_sets):
        return [CutEffect(size, size) for _, size in cuts(key_sets)]

    # The first round has both that are loud early; the rest is loud, and a round without effect ends it.
    late = screen(9, [3, 8, 1, 0, 2, 4, 5], effects, top=2, tolerance=0.1)
    assert asked == [[(3,), (8,), (1, 0, 2, 4, 5)], [(1,), (0,)], [(2, 4, 5)]]
    assert [(group.keys, group.role) for group in late.groups] == [
        ((0, 1, 2, 4, 5), "split"),
        ((2, 4, 5), "bound"),
    ]
    asked.clear()
    quiet = screen(9, [3, 8, 5, 0, 2], effects, top=3, tolerance=0.1)
    assert asked == [[(3,), (8,), (5,), (0, 2)]] and quiet.groups[0].role == "bound"
    asked.clear()
    # Its effects cancel, its size does not: under such a rest the search goes on.
    assert screen(9, [3, 8, 5, 0, 2], cuts, top=3, tolerance=0.1).groups[0].role == "bound"
    loud.add(0)
    cancelling = screen(9, [3, 8, 5, 0, 2, 1], effects, top=3, tolerance=0.1)
    assert asked[-1] == [(0,), (2,), (1,)] and cancelling.groups[0].role == "split"


def test_the_order_is_that_of_the_largest_share_or_of_the_cut_score(bridges, long_trace):
    saliency = step_saliency(bridges("llama"), long_trace, layers=[0, 2])
    lengths = [step.n_tokens for step in long_trace.steps]
    query, shares = 7, []
    for key in range(query):
        over_layers = []
        for layer in range(2):
            row = [
                float(saliency.sums[layer, :, query, j].double().mean()) / (lengths[query] * lengths[j])
                for j in range(query + 1)
            ]
            over_layers.append(row[key] / sum(row))
        shares.append(max(over_layers))
    expected = sorted(range(query), key=lambda key: -shares[key])
    assert promise_order(promise(saliency), query, range(query)) == tuple(expected)
    assert expected != sorted(expected) and expected != sorted(expected, reverse=True)
    cut = step_saliency(bridges("llama"), long_trace, score="cut")
    row = cut.sums.double()[:, :, query, :query]
    sizes = row.sum((0, 1)).abs() + row.abs().sum((0, 1)) / 4
    expected = sorted(range(query), key=lambda key: -float(sizes[key]))
    assert promise_order(promise(cut), query, range(query)) == tuple(expected)


# --- against all pairs and the slow loop --------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("measure", ["nll", "kl"])
def test_screened_is_all_pairs_where_both_measure_and_groups_are_joint_cuts(
    name, measure, bridges, long_trace, float64_throughout
):
    model = bridges(name)
    whole = step_knockout(model, long_trace, measure=measure)
    # Most rests do something on a random model: choose what splits some groups and leaves others.
    tolerance = float(whole.effects[whole.measured].abs().quantile(0.75))
    found = step_knockout(model, long_trace, measure=measure, tolerance=tolerance, method="cached", **SMALL)
    assert 0 < found.measured.sum() < whole.measured.sum()
    torch.testing.assert_close(found.effects[found.measured], whole.effects[found.measured], **EXACT)
    assert {"bound", "split"} == {group.role for group in found.groups}
    for query, sets in candidate_sets(found).items():
        assert sorted(key for keys in sets for key in keys) == list(range(query)), "complete and disjoint"
    for group in found.groups:
        values = (group.effect, group.size)
        for value, which in zip(values, (measure, "size" if measure == "nll" else "kl"), strict=True):
            expected = effect(model, long_trace, group.query, group.keys, measure=which)
            assert value == pytest.approx(expected, abs=1e-8)
    assert torch.equal(found.bounds.isfinite(), whole.measured & ~found.measured)


def test_the_full_method_with_bands_heads_and_onto_finds_the_same(bridges, long_trace, float64_throughout):
    model, where = bridges("gpt_oss"), dict(layers=[1, 3], heads=[0, 3], onto="summary", measure="kl")
    expected = all_effects(model, long_trace, **where)
    tolerance = float(expected[expected > 0].quantile(0.9))
    fast, slow = (
        step_knockout(model, long_trace, method=method, tolerance=tolerance, **where, **SMALL)
        for method in ("cached", "full")
    )
    torch.testing.assert_close(fast.effects, slow.effects, **EXACT)
    same, other = ([(g.query, g.keys, g.role) for g in found.groups] for found in (fast, slow))
    assert same == other
    torch.testing.assert_close(slow.effects[slow.measured], expected[slow.measured], **EXACT)
    assert 0 < slow.measured.sum() < 45 and slow.effects.max() > 1e-3
    assert "summary" in slow.provenance.notes["ranking"]


def test_nothing_is_left_to_groups_without_tolerance_or_with_room_for_all(
    bridges, long_trace, float64_throughout
):
    model = bridges("llama")
    whole = step_knockout(model, long_trace)
    everything = step_knockout(model, long_trace, pairs="screened", top=20)
    assert torch.equal(everything.measured, whole.measured) and not everything.groups
    torch.testing.assert_close(everything.effects, whole.effects, **EXACT)
    strict = step_knockout(model, long_trace, pairs="screened", top=1, tolerance=0.0)
    assert torch.equal(strict.measured, whole.measured)
    assert {group.role for group in strict.groups} == {"split"}
    none = step_knockout(model, long_trace, pairs="screened", top=0)
    assert none.measured.sum() == 1 and {group.role for group in none.groups} == {"bound"}


def test_a_ranking_that_is_handed_in_is_used_and_saves_its_passes(bridges, long_trace):
    model, options = bridges("llama"), dict(tolerance=1e9, **SMALL)
    computed = step_knockout(model, long_trace, **options)
    ranking = step_saliency(model, long_trace, score="cut")
    handed = step_knockout(model, long_trace, ranking=ranking, **options)
    assert torch.equal(computed.measured, handed.measured)
    assert computed.tokens_run - handed.tokens_run == 3 * len(long_trace)
    response = step_saliency(model, long_trace, objective="response", layers=[3])
    other = step_knockout(model, long_trace, ranking=response, **options)
    firsts = [promise_order(promise(response), query, range(query))[0] for query in range(3, 10)]
    assert [int(row.nonzero()) for row in other.measured[3:]] == firsts
    assert not torch.equal(other.measured, handed.measured)
    assert other.provenance.notes["ranking"].startswith("Step-Saliency, response, ")
    assert other.provenance.notes["screening"] == "top 1, tolerance 1e+09"


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
def test_it_runs_under_stepflow_and_hooks_on_every_kind_of_model(
    tiny_model, long_trace, kind, hooks_untouched
):
    model, flow = tiny_model(kind), StepFlow(tau_max=0.5, alpha=0.5)
    with hooks_untouched(model):
        found = step_knockout(model, long_trace, stepflow=flow, tolerance=0.02, **SMALL)
        whole = step_knockout(model, long_trace, stepflow=flow)
    assert found.provenance.backend == "full"
    assert torch.equal(found.effects[found.measured], whole.effects[found.measured])
    assert found.provenance.notes["stepflow"] == repr(flow)


@pytest.mark.parametrize("batch_tokens", [1, 250, 10_000])
def test_batches_hold_what_they_may_and_the_counter_counts_what_ran(
    batch_tokens, bridges, long_trace, monkeypatch, float64_throughout
):
    batches, run = [], prefix_cache._TransformersPrefix.run

    def counted(self, start, end, n_rows):
        batches.append((n_rows, start, end))
        return run(self, start, end, n_rows)

    monkeypatch.setattr(prefix_cache._TransformersPrefix, "run", counted)
    model, options = bridges("gemma2"), dict(pairs="screened", top=2, tolerance=0.05, method="cached")
    ranking = step_saliency(model, long_trace)
    found = step_knockout(model, long_trace, ranking=ranking, batch_tokens=batch_tokens, **options)
    assert all(n_rows * end <= batch_tokens or n_rows <= 2 for n_rows, _, end in batches)
    n_uncut = sum(n_rows for n_rows, *_ in batches) - int(found.measured.sum()) - len(found.groups)
    # A row to check the cache once in each eighth of the trace, in every batch of that round.
    assert n_uncut >= 5 and (batch_tokens < 1000 or n_uncut < 9)
    assert found.tokens_run == sum(n * (end - start) for n, start, end in batches) + 2 * len(long_trace)
    whole = step_knockout(model, long_trace, ranking=ranking, **options)
    torch.testing.assert_close(found.effects, whole.effects, **EXACT)
    full = step_knockout(model, long_trace, pairs=[("T2", "Q"), ("T3", "Q")], method="full")
    assert full.tokens_run == 3 * len(long_trace)


# --- what hides ---------------------------------------------------------------------------------------------


def hiding(model, trace, query, hidden, push):
    """Hooks under which two sources stand in for one another: only without both is the query moved."""
    seen = {}
    rows = slice(*trace.steps[query].token_span)
    pattern = model.hook_dict["blocks.0.attn.hook_pattern"].name
    residual = model.hook_dict["blocks.3.hook_resid_post"].name

    def look(attention, hook):
        spans = [slice(*trace.steps[key].token_span) for key in hidden]
        seen["mass"] = [float(attention[0, :, rows, span].detach().sum()) for span in spans]

    def move(activation, hook):
        if any(seen["mass"]):
            return None
        activation = activation.clone()
        activation[:, rows] += push
        return activation

    return [(pattern, look), (residual, move)]


def test_two_sources_that_hide_each_other_are_found(tiny_model, long_trace):
    model, query, hidden = tiny_model("llama"), 8, (2, 5)
    push = 20 * torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(1))
    hooks = hiding(model, long_trace, query, hidden, push)
    options = dict(layers=[0], fwd_hooks=lambda trace: hooks)
    found = step_knockout(model, long_trace, pairs="screened", top=1, tolerance=1e-12, **options)
    mine = [group for group in found.redundant if group.query == query]
    assert len(mine) == 1 and set(hidden) <= set(mine[0].keys)
    assert found.excess(mine[0]) > 5
    left = step_knockout(model, long_trace, pairs="screened", top=1, tolerance=4, **options)
    (bound,) = (group for group in left.groups if group.query == query and group.role == "bound")
    assert bound.size > 5 and set(hidden) <= set(bound.keys), (
        "what a round without effect leaves is said with its size"
    )
    alone = step_knockout(model, long_trace, **options)
    assert alone.effects[query, list(hidden)].abs().max() < 0.3, "no pair shows it"
    chosen = step_knockout(model, long_trace, joint=[(query, hidden), ("T7", ["T1", "T2"])], **options)
    assert [group.keys for group in chosen.redundant if group.query == query] == [hidden]
    assert torch.equal(chosen.effects, alone.effects) and len(chosen.groups) == 2
    text = chosen.table()
    assert "redundant: T8 from 2 together (T2, T5): " in text and "T7 from 2 together (T1, T2): " in text


def test_joint_sets_beside_pairs_alone_and_screened(bridges, long_trace, float64_throughout):
    model = bridges("gemma2")
    joint = [("T4", ["T1", "Q"]), (9, (1, 4, 2)), ("T4", ["Q", "T1"]), ("T2", [2, "T1"])]
    sets = [(2, (1, 2)), (4, (0, 1)), (9, (1, 2, 4))]
    for options in (
        dict(pairs=[]),
        dict(),
        dict(pairs="screened", top=1, tolerance=0.1),
        dict(method="full"),
    ):
        found = step_knockout(model, long_trace, joint=joint, **options)
        chosen = [group for group in found.groups if group.role == "joint"]
        assert [(group.query, group.keys) for group in chosen] == sets
        for group in chosen:
            expected = effect(model, long_trace, group.query, group.keys)
            assert group.effect == pytest.approx(expected, abs=1e-8) and abs(expected) > 1e-3
        assert bool(found.measured.any()) == (options.get("pairs") != [])
    only, whole = (
        step_knockout(model, long_trace, joint=joint, **options) for options in (dict(pairs=[]), {})
    )
    assert math.isnan(only.excess(only.groups[1])) and not only.redundant
    alone = float(whole.effects[4, :2].sum())
    assert whole.excess(whole.groups[1]) == pytest.approx(whole.groups[1].effect - alone, abs=1e-12)
    assert math.isnan(whole.excess(whole.groups[0])), "T2 from itself was not cut alone"


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (dict(pairs="screened", top=-1), "KnockoutError", "top is -1 and tolerance 0.25: expected"),
        (dict(pairs="screened", tolerance=-0.1), "KnockoutError", "tolerance -0.1: expected .* at least 0"),
        (dict(pairs="screened", tolerance=math.nan), "KnockoutError", "tolerance nan"),
        (dict(joint=["S1"]), "KnockoutError", r"joint entry 'S1': expected \(query step, \[key steps\]\)"),
        (dict(joint=[("S1", "Q")]), "KnockoutError", r"joint entry \('S1', 'Q'\): expected"),
        (dict(joint=[("S1", ["Q", "Q"])]), "KnockoutError", r"names 1 key step\(s\): expected two or more"),
        (dict(joint=[("Q", ["T1", "T2"])]), "AlignmentError", r"pair \(Q, T1\): the key step comes after"),
        (dict(joint=[("S1", ["Q", "T99"])]), "TraceError", "no step 'T99'"),
        (dict(joint=[("T3", ["Q", "T1"])], pairs="screened", onto="T1"), "KnockoutError", "T3 has no"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_words(options, error, said, bridges, long_trace, hooks_untouched):
    model = bridges("llama")
    with hooks_untouched(model), pytest.raises(getattr(errors, error), match=said):
        step_knockout(model, long_trace, **options)


def test_a_ranking_must_be_of_this_trace_and_of_a_screening(bridges, long_trace, tiny_trace):
    model = bridges("llama")
    with pytest.raises(errors.KnockoutError, match="ranking is of another trace: pass the"):
        step_knockout(model, long_trace, pairs="screened", ranking=step_saliency(model, tiny_trace))
    with pytest.raises(errors.KnockoutError, match="ranking= goes with pairs='screened'"):
        step_knockout(model, long_trace, ranking=step_saliency(model, long_trace))
