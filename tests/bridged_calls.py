"""Attention calls under the bridge, without a model: labelled rows, and the hook on scores written out."""

from types import SimpleNamespace

import torch

N_HEADS, N_KV_HEADS, WIDTH = 6, 2, 8


def label_table(*shapes):
    """One row per `(question, thinking, summary)`, padded on the left; markers between; steps of 1, 4, 9."""
    from stepflow_tl.stepflow.columns import NEVER, LabelTable
    from stepflow_tl.trace.steps import Segment

    def tokens(question, thinking, summary):
        row = [(Segment.TEMPLATE, -1)] * 2 + [(Segment.QUESTION, 0)] * question + [(Segment.TEMPLATE, -1)]
        step = 0
        for segment, length in ((Segment.THINKING, thinking), (Segment.SUMMARY, summary)):
            while length > 0:
                step += 1
                size = min(length, (1, 9, 4)[step % 3])
                row += [(segment, step)] * size
                length -= size
            row += [(Segment.TEMPLATE, -1)] * (segment == Segment.THINKING)
        return row

    rows = [tokens(*shape) for shape in shapes]
    longest = max(map(len, rows))
    table = LabelTable(len(rows))
    table.extend(longest)
    for row, labels in enumerate(rows):
        first = longest - len(labels)
        for column, (segment, step) in enumerate(labels, first):
            table.segment[row, column], table.step[row, column] = int(segment), step
            table.template_from[row, column] = column if segment == Segment.TEMPLATE else NEVER
    return table, [longest - len(labels) for labels in rows]


def flow_state(*shapes, last_only=False):
    """Of a whole pass over such rows, or of the pass of their last tokens."""
    from stepflow_tl.stepflow.state import FlowState, Pass

    table, padding = label_table(*shapes)
    n = table.n_columns
    return FlowState(table, Pass(n - 1, 1) if last_only else Pass(0, n), padding)


def visible_keys(state, window=None):
    """`[row, 1, query, key]`: causality, window and padding of the pass."""
    columns = torch.arange(state.current.end)
    queries = columns[state.current.start :, None]
    seen = columns <= queries
    if window is not None:
        seen = seen & (columns > queries - window)
    padding = torch.tensor(state.padding)[:, None, None, None]
    return seen[None, None] & (columns >= padding)


def draw_call(state, *, dtype=torch.float64, spread=1.5, seed=0, n_heads=N_HEADS, n_kv_heads=N_KV_HEADS):
    """Random query, key, value and sinks of the pass; TEMPLATE keys are the favourites of many rows."""
    generator = torch.Generator().manual_seed(seed)
    n_rows, n_queries, n_keys = state.labels.n_rows, state.current.n_queries, state.current.end

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query = draw(n_rows, n_heads, n_queries, WIDTH) * spread
    key, value = (draw(n_rows, n_kv_heads, n_keys, WIDTH) for _ in range(2))
    key *= torch.where(torch.from_numpy(state.labels.step) < 0, 3.0, 1.0)[:, None, :, None]
    return tuple(x.to(dtype) for x in (query, key, value, draw(n_heads)))


def written_out(
    state,
    query,
    key,
    value,
    *,
    scale,
    window=None,
    softcap=None,
    sinks=None,
    own_key=None,
    own_value=None,
    **options,
):
    """z and the pattern of every query, by `bridge_hook` on its scores; `own_*` replace the diagonal's."""
    from stepflow_tl.stepflow.bridge import bridge_hook

    groups = query.shape[1] // key.shape[1]
    expand = lambda x: x.repeat_interleave(groups, dim=1)  # noqa: E731
    scores = query @ expand(key).mT * scale
    diagonal = torch.eye(scores.shape[-1], dtype=torch.bool)[-scores.shape[-2] :]
    if own_key is not None:
        own = (query * expand(own_key)).sum(-1) * scale
        scores = torch.where(diagonal, own[..., None].expand_as(scores), scores)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible_keys(state, window), -torch.inf)
    hook = SimpleNamespace(name="blocks.0.attn.hook_attn_scores")
    scores = bridge_hook(scores, hook, state=state, sinks=sinks, **options)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    pattern = torch.softmax(scores, dim=-1)[..., : key.shape[2]].nan_to_num(0)
    if pattern.requires_grad:
        pattern.retain_grad()
    z = pattern @ expand(value)
    if own_value is not None:
        z = z + (pattern * diagonal).sum(-1, keepdim=True) * (expand(own_value) - expand(own_value).detach())
    return z, pattern
