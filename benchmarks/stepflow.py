"""What StepFlow costs: decoding with a cache, and prefill, against transformers' own SDPA.

    python benchmarks/stepflow.py [--model MODEL.gguf] [--dtype bfloat16] [--batches 1 8 32]
                                  [--contexts 256 1024 4096] [--prefill 8192] [--repeats 5] [--steps 32]
                                  [--ways plain StepFlow] [--json out.json]

1. Four ways decode the same tokens with the same weights: transformers with "sdpa" (plain), StepFlow on the
   transformers model, StepFlow on the TransformerBridge, and StepFlow on the bridge while somebody listens at
   the scores of every layer, which is TransformerLens' eager attention (`eager`).
2. A context is a quarter question and three quarters thinking, so the bridge looks at every new token. Rows
   of a batch differ in length by 0 to 7 tokens and are padded on the left. One row is read; its cache is
   repeated over the batch, and the stream is told of the rows, so 4 096 tokens x 32 rows need no prefill.
3. The new tokens are given, not chosen, and begin no step: injections cost nothing here, and in a long answer
   next to nothing (one token in a step).
4. Ways take turns, `--repeats` times `--steps` tokens after a warm-up; a cell is the median over turns, a
   ratio the median of turn-wise ratios to plain: above 1 is faster. A turn's first token builds what depends
   on the whole context, so short turns show StepFlow slower than it is in an answer.
5. Prefill: one pass over so many tokens of question and thinking, plain and under StepFlow.

Without --model, the default model.
"""

import argparse
import json
import statistics
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from stepflow_tl import StepFlow, load_model
from stepflow_tl.models.loading import load_default_model

WAYS = ("plain", "StepFlow", "StepFlow on the bridge", "eager")
QUESTION = "A shop sells pens at 3 dollars and books at 12 dollars. "
THINKING = "First we look at the numbers again and add what we know so far. "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--contexts", type=int, nargs="*", default=[256, 1024, 4096])
    parser.add_argument("--steps", type=int, default=32, help="tokens of a turn")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--prefill", type=int, nargs="*", default=[8192])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    if options.model is None:
        model = load_default_model(device=options.device, dtype=dtype)
    else:
        model = load_model(options.model, device=options.device, dtype=dtype)
    model.original_model.set_attn_implementation("sdpa")
    plain = plain_copy(model)
    print(
        f"{options.model or 'default model'}, {options.dtype}, {options.device}, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"{'':34}" + "".join(f"{way:>24}" for way in options.ways) + "   (tokens a second; ratio to plain)")
    found = {}
    with torch.no_grad():
        for context in options.contexts:
            for batch in options.batches:
                name = f"decode, {batch} rows, context {context}"
                runs = decoders(model, plain, batch, context, options.steps)
                runs = {way: runs[way] for way in options.ways}
                found[name] = in_turns(runs, batch * options.steps, options.repeats)
                show(name, found[name])
        for n_tokens in options.prefill:
            name = f"prefill, {n_tokens} tokens"
            found[name] = in_turns(prefills(model, plain, n_tokens), n_tokens, max(1, options.repeats // 2))
            show(name, found[name])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def plain_copy(model):
    """The transformers model of the bridge's weights, without the bridge's modules around them."""
    inner = model.original_model
    copy = type(inner)._from_config(
        inner.config, attn_implementation="sdpa", dtype=next(inner.parameters()).dtype
    )
    names = {name.replace("._original_component", ""): value for name, value in inner.state_dict().items()}
    copy.load_state_dict({name: names[name] for name in copy.state_dict()}, assign=True)
    copy.tie_weights()
    return copy.to(next(inner.parameters()).device).eval()


def context_ids(model, n_tokens):
    """Question and thinking in the chat format, exactly so many tokens; the thinking is open."""
    tokenizer = model.tokenizer
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    opening, closing = ids("<|im_start|>user\n"), ids("<|im_end|>\n<|im_start|>assistant\n")
    n_question = n_tokens // 4
    question = (ids(QUESTION) * (n_question // 8))[:n_question]
    n_thinking = n_tokens - len(opening) - n_question - len(closing)
    thinking = (ids(THINKING) * (1 + n_thinking // 8))[:n_thinking]
    return torch.tensor([*opening, *question, *closing, *thinking], device=next(model.parameters()).device)


def decoders(model, plain, batch, context, steps):
    """By way: what decodes `steps` tokens of `batch` rows after the context."""
    ids = context_ids(model, context)
    rows = ids[None].repeat(batch, 1)
    mask = torch.ones_like(rows)
    for row in range(batch):
        mask[row, : row % 8] = 0
    new = ids[-steps:][None].repeat(batch, 1)
    with setting("plain", model, plain) as (runner, _):
        read = runner(input_ids=rows[:1], use_cache=True, logits_to_keep=1).past_key_values

    def decode(way):
        from transformers import DynamicCache

        cache = DynamicCache(config=plain.config)
        for layer, held in enumerate(read.layers):
            parts = (x.repeat(batch, 1, 1, 1) for x in (held.keys, held.values))
            cache.update(*parts, layer)
        with setting(way, model, plain) as (runner, run):
            if run is not None:
                run.stream.advance(rows.cpu().numpy(), 0, mask.cpu().numpy() == 0)
            start = time.perf_counter()
            seen = mask
            for step in range(steps):
                seen = torch.cat([seen, seen.new_ones(batch, 1)], dim=1)
                positions = (seen.cumsum(-1) - 1)[:, -1:]
                runner(
                    input_ids=new[:, step : step + 1],
                    attention_mask=seen,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                )
            return time.perf_counter() - start

    return {way: (lambda way=way: decode(way)) for way in WAYS}


def prefills(model, plain, n_tokens):
    ids = context_ids(model, n_tokens)[None]

    def read(way):
        with setting(way, model, plain) as (runner, _):
            start = time.perf_counter()
            runner(input_ids=ids, use_cache=True, logits_to_keep=1)
            return time.perf_counter() - start

    return {way: (lambda way=way: read(way)) for way in WAYS[:2]}


@contextmanager
def setting(way, model, plain):
    """The model that runs, and the run of the StepFlow that is on it."""
    flow, tokenizer = StepFlow(), model.tokenizer
    options = dict(format="boxed", splitter="paragraph")  # what follows the question is thinking
    with ExitStack() as stack:
        if way == "plain":
            yield plain, None
        elif way == "StepFlow":
            yield plain, stack.enter_context(flow.generating(plain, tokenizer, **options))
        else:
            run = stack.enter_context(flow.generating(model, tokenizer, **options))
            if way == "eager":
                names = [
                    model.hook_dict[f"blocks.{n}.attn.hook_attn_scores"].name
                    for n in range(model.cfg.n_layers)
                ]
                stack.enter_context(
                    model.hooks(fwd_hooks=[(name, lambda scores, hook: None) for name in names])
                )
            yield model.original_model, run


def in_turns(runs, n_tokens, repeats):
    seconds = {way: [] for way in runs}
    for turn in range(repeats + 1):
        for way in list(runs)[:: 1 if turn % 2 else -1]:
            spent = runs[way]()
            if turn:
                seconds[way].append(spent)
    ratios = {
        way: statistics.median(p / s for p, s in zip(seconds["plain"], spent, strict=True))
        for way, spent in seconds.items()
    }
    rates = {way: n_tokens / statistics.median(spent) for way, spent in seconds.items()}
    return {"tokens_per_second": rates, "ratio": ratios, "seconds": seconds}


def show(name, row):
    cells = (f"{row['tokens_per_second'][way]:>14.1f} ({row['ratio'][way]:.2f}) " for way in row["ratio"])
    print(f"{name:34}" + "".join(f"{cell:>24}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
