"""What StepFlow costs: decoding with a cache, and prefill, against transformers' own SDPA.

    python benchmarks/stepflow.py [--model MODEL.gguf] [--dtype bfloat16] [--batches 1 8 32]
                                  [--contexts 256 1024 4096] [--prefill 8192] [--repeats 12] [--steps 4]
                                  [--ways plain StepFlow] [--clock cpu] [--json out.json]

1. Four ways decode the same tokens with the same weights: transformers with "sdpa" (plain), StepFlow on the
   transformers model, StepFlow on the TransformerBridge, and StepFlow on the bridge while somebody listens at
   the scores of every layer, which is TransformerLens' eager attention (`eager`).
2. A context is a quarter question and three quarters thinking, so the bridge looks at every new token; with
   `--summary 64` its last 64 tokens are summary, and the bridge is the thinking, three times as long. Rows of
   a batch differ in length by 0 to 7 tokens and are padded on the left. One row is read; its cache is
   repeated over the batch, and the stream is told of the rows, so 4 096 tokens x 32 rows need no prefill.
3. The new tokens are given, not chosen, and begin no step: injections cost nothing here, and in a long answer
   next to nothing (one token in a step).
4. Ways take short turns in alternating order, after one that does not count: the one cache is cut back to the
   context, a token is decoded to warm up, and `--steps` more are timed. So what slows the machine down for
   some seconds meets all ways.
5. A cell is the median rate, and the median over `--repeats` turns of the ratio to plain in the same turn
   (above 1 is faster) with its 95 % interval, from order statistics. Turns are added to those of the cell
   in `--json`. Where others use the core as well, `--clock cpu` counts the process's own time (one thread).
6. Prefill: one pass over so many tokens of question and thinking, plain and under StepFlow, `--repeats` / 4
   times.

Without --model, the default model.
"""

import argparse
import copy
import json
import math
import statistics
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch
from transformers import DynamicCache

from stepflow_tl import StepFlow, load_model
from stepflow_tl.models.loading import load_default_model

WAYS = ("plain", "StepFlow", "StepFlow on the bridge", "eager")
QUESTION = "A shop sells pens at 3 dollars and books at 12 dollars. "
THINKING = "First we look at the numbers again and add what we know so far. "
FORMAT = dict(format="boxed", splitter="paragraph")  # what follows the question is thinking


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--contexts", type=int, nargs="*", default=[256, 1024, 4096])
    parser.add_argument("--steps", type=int, default=4, help="tokens of a turn")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--prefill", type=int, nargs="*", default=[8192])
    parser.add_argument("--summary", type=int, default=0, help="tokens of a context that are summary")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    if options.model is None:
        model = load_default_model(device=options.device, dtype=dtype)
    else:
        model = load_model(options.model, device=options.device, dtype=dtype)
    model.original_model.set_attn_implementation("sdpa")
    plain, flowing = plain_copy(model), plain_copy(model)
    print(
        f"{options.model or 'default model'}, {options.dtype}, {options.device}, "
        f"{torch.get_num_threads()} threads"
    )
    print("tokens a second (ratio to plain [95 % interval])")
    print(f"{'':34}" + "".join(f"{way:>30}" for way in options.ways), flush=True)
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[options.clock]
    with torch.no_grad():
        for context in options.contexts:
            ids = context_ids(model, context, options.summary)
            read = plain(input_ids=ids[None], use_cache=True, logits_to_keep=1).past_key_values
            for batch in options.batches:
                with ExitStack() as stack:
                    runs = decoders(model, plain, flowing, options, read, ids.repeat(batch, 1), stack, clock)
                    seconds = in_turns(runs, options.repeats)
                name = f"decode, {batch} rows, context {context}"
                show(name, added(name, seconds, options.json), batch * options.steps)
        for n_tokens in options.prefill:
            seconds = in_turns(prefills(model, plain, flowing, n_tokens, clock), max(1, options.repeats // 4))
            name = f"prefill, {n_tokens} tokens"
            show(name, added(name, seconds, options.json), n_tokens)


def plain_copy(model):
    """The transformers model of the bridge's weights, without the bridge's modules around them."""
    inner, config = model.original_model, copy.deepcopy(model.original_model.config)  # attention is set on it
    plain = type(inner)._from_config(config, attn_implementation="sdpa", dtype=next(inner.parameters()).dtype)
    names = {name.replace("._original_component", ""): value for name, value in inner.state_dict().items()}
    plain.load_state_dict({name: names[name] for name in plain.state_dict()}, assign=True)
    plain.tie_weights()
    return plain.to(next(inner.parameters()).device).eval()


def context_ids(model, n_tokens, n_summary=0):
    """Question, thinking and summary in the chat format, exactly so many tokens; the last of them is open."""
    tokenizer = model.tokenizer
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    opening, closing = ids("<|im_start|>user\n"), ids("<|im_end|>\n<|im_start|>assistant\n")
    n_question = n_tokens // 4
    question = (ids(QUESTION) * (n_question // 8))[:n_question]
    summary = (ids("\\boxed{") + ids(THINKING) * n_summary)[:n_summary]
    n_thinking = n_tokens - len(opening) - n_question - len(closing) - n_summary
    thinking = (ids(THINKING) * (1 + n_thinking // 8))[:n_thinking]
    ids = [*opening, *question, *closing, *thinking, *summary]
    return torch.tensor(ids, device=next(model.parameters()).device)


def decoders(model, plain, flowing, options, read, rows, stack, clock):
    """By way: what decodes so many tokens after the context of each row, and says how long that took."""
    batch, context = rows.shape
    mask = torch.ones_like(rows)
    for row in range(batch):
        mask[row, : row % 8] = 0
    cache = DynamicCache(config=plain.config)
    for layer, held in enumerate(read.layers):
        cache.update(held.keys.repeat(batch, 1, 1, 1), held.values.repeat(batch, 1, 1, 1), layer)
    for under_flow, its_ways in ((flowing, WAYS[1:2]), (model, WAYS[2:])):
        if set(its_ways) & set(options.ways):
            run = stack.enter_context(StepFlow().generating(under_flow, model.tokenizer, **FORMAT))
            run.stream.advance(rows.cpu().numpy(), 0, mask.cpu().numpy() == 0)
    names = [f"blocks.{layer}.attn.hook_attn_scores" for layer in range(model.cfg.n_layers)]
    listeners = [(model.hook_dict[name].name, lambda scores, hook: None) for name in names]
    runners = dict(zip(WAYS, (plain, flowing, model.original_model, model.original_model), strict=True))

    def turn(way):
        cache.crop(context - cache.get_seq_length())
        seen = mask
        with model.hooks(fwd_hooks=listeners) if way == "eager" else nullcontext():
            for step in range(options.steps + 1):
                if step == 1:
                    start = clock()
                seen = torch.cat([seen, seen.new_ones(batch, 1)], dim=1)
                runners[way](
                    input_ids=rows[:, step - options.steps - 1, None],
                    attention_mask=seen,
                    position_ids=(seen.cumsum(-1) - 1)[:, -1:],
                    past_key_values=cache,
                    use_cache=True,
                )
            return clock() - start

    return {way: (lambda way=way: turn(way)) for way in options.ways}


def prefills(model, plain, flowing, n_tokens, clock):
    ids = context_ids(model, n_tokens)[None]

    def read(runner, flow):
        with flow:
            start = clock()
            runner(input_ids=ids, use_cache=True, logits_to_keep=1)
            return clock() - start

    under_flow = lambda: StepFlow().generating(flowing, model.tokenizer, **FORMAT)  # noqa: E731
    return {"plain": lambda: read(plain, nullcontext()), "StepFlow": lambda: read(flowing, under_flow())}


def in_turns(runs, repeats):
    seconds = {way: [] for way in runs}
    for turn in range(repeats + 1):
        for way in list(runs)[:: 1 if turn % 2 else -1]:
            spent = runs[way]()
            if turn:
                seconds[way].append(spent)
    return seconds


def added(name, seconds, path):
    """The turns of a cell, after those that the file holds; all are written there."""
    if path is None:
        return seconds
    held = json.loads(path.read_text()) if path.exists() else {}
    held[name] = {way: held.get(name, {}).get(way, []) + spent for way, spent in seconds.items()}
    path.write_text(json.dumps(held, indent=1))
    return held[name]


def median_and_interval(values):
    """The median, and its 95 % interval: the innermost order statistics that hold it so often."""
    n, values = len(values), sorted(values)
    outside = [2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n for k in range(n // 2)]
    k = sum(share <= 0.05 for share in outside) - 1
    low, high = (values[k], values[n - 1 - k]) if k >= 0 else (math.nan, math.nan)
    return statistics.median(values), low, high


def show(name, seconds, n_tokens):
    parts = []
    for spent in seconds.values():
        ratio = median_and_interval([p / s for p, s in zip(seconds["plain"], spent, strict=True)])
        parts.append("{:.1f} ({:.3f} [{:.3f}, {:.3f}])".format(n_tokens / statistics.median(spent), *ratio))
    print(f"{name:34}" + "".join(f"{part:>30}" for part in parts), flush=True)


if __name__ == "__main__":
    main()
