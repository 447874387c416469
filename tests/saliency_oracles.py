"""Step saliency the slow obvious way, written for the tests alone: nothing here comes from the package."""

import torch

# A trace: TEMPLATE at the start, inside and at the end; steps of one token; lengths that no tile divides.
STEP_IDS = torch.tensor([-1] * 2 + [0] * 5 + [1] + [-1] * 3 + [2] * 14 + [3] * 15 + [4] + [-1])
N_TOKENS = len(STEP_IDS)
TOKENS = torch.randint(3, 260, (N_TOKENS,), generator=torch.Generator().manual_seed(0))


def patterns_and_logits(model, tokens, fwd_hooks=()):
    """A forward pass that keeps every pattern in the graph, by plain hooks written for this test alone."""
    patterns = {}

    def keep(pattern, hook):
        pattern.retain_grad()
        patterns[int(hook.name.split(".")[1])] = pattern

    def start(embedding, hook):
        return embedding.detach().requires_grad_(True)

    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    embed = model.hook_dict["hook_embed"].name
    with model.hooks(fwd_hooks=[(embed, start), *fwd_hooks, *((name, keep) for name in names)]):
        logits = model(tokens[None], return_type="logits")
    return patterns, logits


def nll(logits, tokens):
    return -torch.log_softmax(logits[0, :-1], -1).gather(-1, tokens[1:, None])[:, 0]


def pool_by_loops(saliency, ids):
    """The definition, two loops: sum of |A dL/dA| over each step pair; the last column is TEMPLATE."""
    n_steps = int(ids.max()) + 1
    pooled = torch.zeros(*saliency.shape[:-2], n_steps, n_steps + 1, dtype=saliency.dtype)
    for i in range(n_steps):
        for j in range(n_steps + 1):
            keys = ids == (j if j < n_steps else -1)
            pooled[..., i, j] = saliency[..., ids == i, :][..., keys].sum((-1, -2))
    return pooled


def separate_backward_passes(model, tokens, fwd_hooks=()):
    """The paper's definition: for every t a backward pass of L_t alone, of which row t is kept."""
    rows = torch.zeros(model.cfg.n_layers, model.cfg.n_heads, len(tokens), len(tokens), dtype=torch.float64)
    for t in range(len(tokens) - 1):
        patterns, logits = patterns_and_logits(model, tokens, fwd_hooks)
        nll(logits, tokens)[t].backward()
        for layer, pattern in patterns.items():
            rows[layer, :, t] = (pattern.detach() * pattern.grad)[0, :, t].abs().double()
    return rows


def cut_by_loops(scores, value, dz, ids, sinks=None):
    """What each step's removal does, row by row: its scores to -inf, softmax and z again, `<dz, z_cut - z>`.

    `scores` are `[head, query, key]`, -inf where hidden; `value` and `dz` are `[head, token, d]`. Rows in
    which nothing else is left count 0. The last column is TEMPLATE.
    """

    def attend(scores):
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:2], 1)], dim=-1)
        pattern = torch.softmax(scores, dim=-1)[..., : value.shape[1]]
        return pattern.nan_to_num(0) @ value  # a row of -inf alone

    n_steps, z = int(ids.max()) + 1, attend(scores)
    effects = torch.zeros(len(scores), n_steps, n_steps + 1, dtype=scores.dtype)
    for j in range(n_steps + 1):
        left = scores.masked_fill(ids == (j if j < n_steps else -1), -torch.inf)
        change = (dz * (attend(left) - z)).sum(-1)
        if sinks is None:
            change = change.masked_fill((left == -torch.inf).all(-1), 0)
        for i in range(n_steps):
            effects[:, i, j] = change[:, ids == i].sum(-1)
    return effects


def cut_of_pattern(pattern, value, dz, ids, *, with_sink):
    """`cut_by_loops` of one sequence's pattern: logarithms are scores, and that of the rest the sink's."""
    with torch.no_grad():
        pattern, heads = pattern.detach()[0], pattern.shape[1]
        scores = pattern.log()
        if with_sink:  # a row's scores up to a number: the sink's is 0
            scores = scores - (1 - pattern.sum(-1, keepdim=True)).log()
        value = value[0].repeat_interleave(heads // value.shape[1], dim=0)
        sinks = torch.zeros(heads, dtype=pattern.dtype) if with_sink else None
        return cut_by_loops(scores, value, dz[0], ids, sinks)
