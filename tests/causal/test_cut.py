"""Which scores a cut marks, that it runs in every layer, and that no query is left without a key."""

from types import SimpleNamespace

import pytest
import torch

from stepflow_tl.causal import cut
from stepflow_tl.causal.cut import EdgeCut, causal_pair, cut_mask
from stepflow_tl.errors import AlignmentError, ModelError
from stepflow_tl.models import hook_names
from stepflow_tl.models.passes import attached


def test_the_mask_marks_queries_and_keys_and_spares_each_token_itself():
    mask = cut_mask(
        (1, 3), [(), [(0, 2)], [(3, 6)], [(0, 1), (5, 6)]], n_queries=4, n_keys=7
    )  # queries are keys 3..6
    assert mask.shape == (4, 1, 4, 7) and not mask[0].any()
    expected = torch.zeros(4, 7, dtype=torch.bool)
    expected[1:3, 0:2] = True
    assert torch.equal(mask[1, 0], expected)
    assert mask[2, 0].nonzero().tolist() == [[1, 3], [1, 5], [2, 3], [2, 4]]
    assert mask[3, 0].nonzero().tolist() == [[1, 0], [1, 5], [2, 0]]


def test_every_layer_and_only_the_chosen_heads_are_cut(tiny_model, tiny_trace, tl_generation):
    model, seen = tiny_model("llama"), {}
    cut = EdgeCut(model, [0, 2], heads=[1])
    n = len(tiny_trace)
    cut.mask = cut_mask((40, 44), [[(20, 25)]], n, n)
    names = [model.hook_dict[f"blocks.{layer}.attn.hook_pattern"].name for layer in range(4)]
    keep = [(name, lambda p, hook: seen.__setitem__(hook.name, p.clone())) for name in names]
    with torch.no_grad(), attached(model, last=[*cut.hooks, *keep]):
        model(tiny_trace.tokens[None], return_type="logits")
    cut.check_fired()
    assert len(cut.hooks) == 2 and len(seen) == 4
    for layer, name in enumerate(names):
        block = seen[name][0, :, 40:44, 20:25]
        is_cut = [layer in (0, 2) and head == 1 for head in range(4)]
        assert [not bool(block[head].any()) for head in range(4)] == is_cut
        assert torch.allclose(seen[name].sum(-1).float(), torch.ones(4, n))


def test_a_hook_that_does_not_fire_is_an_error(tiny_model):
    cut = EdgeCut(tiny_model("llama"), [1, 3])
    with pytest.raises(ModelError, match=r"scores of layers \[1, 3\] fired \[0\] times .* expected once"):
        cut.check_fired()


@pytest.mark.parametrize("kind", ["scores", "pattern"])
def test_a_query_without_any_key_left_is_an_error_not_nan(kind, tiny_model):
    cut = EdgeCut(tiny_model("llama"), [0])
    cut.mask = cut_mask((2, 3), [[(0, 2)]], 3, 3)
    hook = SimpleNamespace(name="blocks.0.attn.hook_attn_scores")
    if kind == "scores":
        attention = torch.zeros(1, 4, 3, 3)
        attention[..., 2, 2] = torch.finfo(torch.float32).min  # a hook has masked the token itself
        run = cut._cut_scores
    else:
        attention = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.5, 0.5, 0]]).expand(1, 4, 3, 3)
        run = cut._cut_pattern
    with pytest.raises(ModelError, match="query 2 of the pass .* has no key left to attend to"):
        run(attention, hook, layer=0)
    cut.mask = cut_mask((2, 3), [[(0, 1)]], 3, 3)  # one key remains
    assert torch.isfinite(run(attention, hook, layer=0).softmax(-1)).all()


def test_keys_that_are_not_the_whole_trace_are_an_error(tiny_model):
    cut = EdgeCut(tiny_model("llama"), [0])
    cut.mask = cut_mask((0, 2), [[(0, 3)]], 2, 9)
    with pytest.raises(ModelError, match=r"\(1, 2, 6\), expected \(1, 2, 9\).*method='full'"):
        cut._cut_scores(torch.zeros(1, 4, 2, 6), SimpleNamespace(name="scores"), layer=0)


def test_attention_left_to_the_wrapped_module_is_refused(tiny_model, monkeypatch):
    monkeypatch.setattr(hook_names, "delegates_attention", lambda model, layer: layer == 2)
    with pytest.raises(ModelError, match="layer 2: .* leaves attention to the wrapped module"):
        cut.EdgeCut(tiny_model("llama"), range(4))


def test_a_pair_leads_backwards(right_trace):
    query, key = causal_pair(right_trace, ("T2", "Q"))
    assert (query.label, key.label) == ("T2", "Q")
    with pytest.raises(
        AlignmentError, match=r"pair \(Q, T2\): the key step comes after the query step, so no attention"
    ):
        causal_pair(right_trace, ("Q", "T2"))
    with pytest.raises(AlignmentError, match=r"pair 'T1': expected two steps, \(query, key\)"):
        causal_pair(right_trace, "T1")
    assert causal_pair(right_trace, (2, query)) == (query, query)
