"""Step knockout the obvious way, sharing nothing with the package: a loop over pairs, tokens and layers."""

import torch


def logits_of(model, tokens, hooks=()):
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        return model(tokens[None], return_type="logits")[0]


def cut_hooks(model, trace, query, key, layers, heads):
    """One hook a layer that writes -inf (or 0 into a pattern, rows then divided by their sum).

    `key` is a step, or several that are cut together.
    """
    hooks, fired = [], []
    keys = [key] if isinstance(key, int) else key

    def edit(attention, hook):
        fired.append(hook.name)
        out = attention.clone()
        is_pattern = "pattern" in hook.name
        for t in range(*trace.steps[query].token_span):
            for s in (s for key in keys for s in range(*trace.steps[key].token_span)):
                if s != t:
                    for head in heads:
                        out[0, head, t, s] = 0 if is_pattern else -torch.inf
        return out / out.sum(-1, keepdim=True) if is_pattern else out

    for layer in layers:
        computed_inside = type(model).__name__ == "TransformerBridge" and "native" in str(
            type(model.original_model).__module__
        )
        name = f"blocks.{layer}.attn.{'hook_pattern' if computed_inside else 'hook_attn_scores'}"
        hooks.append((model.hook_dict[name].name, edit))
    return hooks, fired


def predictions(trace, query, onto):
    """Positions u whose token's NLL counts."""
    if onto is None:
        start, end = trace.steps[query].token_span
        return [t + 1 for t in range(start, end) if t + 1 < len(trace)]
    return [u for u in range(1, len(trace)) if int(trace.segment_ids[u]) == 3]


def effect(model, trace, query, key, *, layers=None, heads=None, measure="nll", onto=None):
    layers = range(model.cfg.n_layers) if layers is None else layers
    heads = range(model.cfg.n_heads) if heads is None else heads
    clean = logits_of(model, trace.tokens).log_softmax(-1)
    hooks, fired = cut_hooks(model, trace, query, key, layers, heads)
    cut = logits_of(model, trace.tokens, hooks).log_softmax(-1)
    assert len(fired) == len(layers)
    total = 0.0
    for u in predictions(trace, query, onto):
        if measure in ("nll", "size"):
            change = float(clean[u - 1, trace.tokens[u]] - cut[u - 1, trace.tokens[u]])
            total += change if measure == "nll" else abs(change)
        else:
            total += float((clean[u - 1].exp() * (clean[u - 1] - cut[u - 1])).sum())
    return total


def all_effects(model, trace, **options):
    n_steps = len(trace.steps)
    out = torch.zeros(n_steps, n_steps, dtype=torch.float64)
    for query in range(n_steps):
        for key in range(query):
            out[query, key] = effect(model, trace, query, key, **options)
    return out
