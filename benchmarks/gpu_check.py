"""Check the GPU path against the tiles of plain PyTorch on random inputs, and time both.

    python benchmarks/gpu_check.py [--tokens 4096] [--long 32768]

Every row is one attention call, forward and backward: the largest error of the pooled map, dq, dk and dv
relative to the largest number of each, and milliseconds (median of five after two to warm up) next to
PyTorch's own SDPA forward and backward. bfloat16 is compared with the float32 tiles on the same numbers. Rows
"bridged" are calls under StepFlow's bridge: its forward on the GPU against the one on the CPU, and the kernel
under it against the tiles, from the same rows; steps make a question, thinking and a summary.
Exits with 1 if an error is out of bounds or two runs differ in a bit. Without a GPU it says so and exits
with 0.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace

import torch

from stepflow_tl.models.attention import Call, Visible, flash_forward
from stepflow_tl.saliency.fused import attention
from stepflow_tl.saliency.fused.bridged import BridgedTerms, Bridging, SequenceGroups
from stepflow_tl.saliency.fused.call import AttentionSpec, BackwardCall
from stepflow_tl.saliency.fused.steps import StepSums, StepTiles
from stepflow_tl.stepflow.bridged_attention import Bridge, BridgedRows, bridged_attention
from stepflow_tl.stepflow.columns import NEVER, LabelTable
from stepflow_tl.stepflow.state import FlowState, Pass
from stepflow_tl.trace.steps import Segment

# heads, KV heads, width: R1-Distill-Qwen-7B, Llama-3 and Gemma shapes, and two odd ones.
SHAPES = [(28, 4, 128), (32, 8, 64), (8, 4, 256), (16, 16, 80), (6, 2, 96)]
OPTIONS = [
    {},
    {"diagonal_only": True},
    {"diagonal_only": True, "window": 1000},
    {"diagonal_only": True, "softcap": 30.0},
]
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def draw(n_tokens, heads, kv_heads, width, dtype):
    randn = lambda h: torch.randn(1, h, n_tokens, width, device="cuda").to(dtype)  # noqa: E731
    return randn(heads), randn(kv_heads), randn(kv_heads), randn(heads)


def random_steps(n_tokens):
    """Steps of 1 to 80 tokens with TEMPLATE before the first and after every tenth."""
    ids, step = [-1] * min(7, n_tokens - 1), 0
    while len(ids) < n_tokens:
        ids += [step] * int(torch.randint(1, 81, ())) + [-1] * (3 if step % 10 == 9 else 0)
        step += 1
    ids = torch.tensor(ids[:n_tokens])
    return StepTiles(ids, int(ids.max()) + 1)


def bridging_of(tiles, granularity, device):
    """The bridge on a trace of these steps: the first is the question, the last fifth the summary."""
    n_tokens = len(tiles.step_ids)
    labels = LabelTable(1)
    labels.extend(n_tokens)
    labels.step[0] = tiles.step_ids.numpy()
    has_step = labels.step[0] >= 0
    labels.template_from[0, has_step] = NEVER
    labels.segment[0, has_step] = int(Segment.THINKING)
    labels.segment[0, labels.step[0] == 0] = int(Segment.QUESTION)
    labels.segment[0, has_step & (labels.step[0] >= tiles.n_steps * 4 // 5)] = int(Segment.SUMMARY)
    state = FlowState(labels, Pass(0, n_tokens))
    groups = (SequenceGroups(state.spans(n_tokens, granularity), 0, n_tokens),)
    return Bridging(Bridge(0.5, 0.9), state.spans(n_tokens, granularity, device=device), groups)


def forward_bridged(query, key, value, spec, bridging):
    """z without the bridge, its logsumexp, z under it, and what a backward pass needs."""
    n_tokens = query.shape[2]
    z, logsumexp = attention._forward(query, key, value, None, spec)
    call = Call(query, key, value, z, logsumexp, Visible(n_tokens, n_tokens, window=spec.window), spec.scale)
    call = replace(call, softcap=spec.softcap)
    kept = BridgedRows.nothing(bridging.spans, call)
    return z, logsumexp, bridged_attention(call, bridging.spans, bridging.bridge, kept=kept), kept


def bridged_path(query, key, value, dz, spec, sums, bridging):
    """Forward, bridge and backward by the kernels."""
    z, logsumexp, _, kept = forward_bridged(query, key, value, spec, bridging)
    delta = torch.einsum("bhtd,bhtd->bht", dz.float(), z.float())
    terms = BridgedTerms.of(kept, dz, delta, bridging)
    return attention.kernel_backward(
        BackwardCall(query, key, value, logsumexp, dz, delta, spec, terms), z, sums
    )


def check_bridged(n_tokens, shape, dtype, granularity, options):
    """Print one row of a bridged call; whether all is within bounds."""
    inputs = draw(n_tokens, *shape, dtype)
    tiles, spec = random_steps(n_tokens), AttentionSpec(shape[-1] ** -0.5, diagonal_only=True, **options)
    bridging = bridging_of(tiles, granularity, "cuda")
    name = f"{n_tokens:>6} {str(shape):>14} {str(dtype)[6:]:>9} bridged by {granularity} {options or ''}"
    if not attention.kernels_serve(*inputs[:3], spec, pooling=True):
        print(f"{name}: not served on this machine, tiles are used")
        return True
    sums = [
        StepSums.zeros(tiles, shape[0], dtype=torch.float32, device=torch.device("cuda")) for _ in range(3)
    ]
    first, again = (bridged_path(*inputs, spec, own, bridging) for own in sums[:2])
    # The tiles start from the same z, logsumexp and rows: another rounding tips rows that are near tau.
    z, logsumexp, ours, kept = forward_bridged(*inputs[:3], spec, bridging)
    delta = torch.einsum("bhtd,bhtd->bht", inputs[3].float(), z.float())
    terms = BridgedTerms.of(kept, inputs[3], delta, bridging)
    wide = BackwardCall(*(x.float() for x in inputs[:3]), logsumexp, inputs[3].float(), delta, spec, terms)
    theirs = (
        attention.tiled_backward(wide, sums[2], (True, False, False))[0],
        *attention.diagonal_gradients(wide),
    )
    on_cpu = bridging_of(tiles, granularity, "cpu")
    cpu_z = forward_bridged(*(x.float().cpu() for x in inputs[:3]), spec, on_cpu)[2]
    errors = [error(sums[0].sums, sums[2].sums), error(ours.cpu(), cpu_z)]
    errors += [error(a, b) for a, b in zip(first, theirs, strict=True)]
    same = torch.equal(sums[0].sums, sums[1].sums) and all(map(torch.equal, first, again))
    kernels = milliseconds(lambda: bridged_path(*inputs, spec, sums[0], bridging))
    unbridged = milliseconds(lambda: device_path(*inputs, spec, sums[0]))
    fine = max(errors) < BOUNDS[dtype] and same
    print(
        f"{name}: {float(kept.active.float().mean()):.0%} of rows; map {errors[0]:.1e} z {errors[1]:.1e} "
        f"dq {errors[2]:.1e} dk {errors[3]:.1e} dv {errors[4]:.1e}; "
        f"{'same bits' if same else 'BITS DIFFER'}; "
        f"{kernels:.2f} ms, plain {unbridged:.2f} ms ({kernels / unbridged:.2f})"
        f"{'' if fine else '  OUT OF BOUNDS'}",
        flush=True,
    )
    return fine


def device_path(query, key, value, dz, spec, sums):
    """Forward and backward by the kernels; the tiles' forward where flash does not serve."""
    if attention.flash_serves(query, key, value, spec):
        z, logsumexp = flash_forward(query, key, value, spec.scale)
    else:
        z, logsumexp = attention._forward(query, key, value, None, spec)
    delta = torch.einsum("bhtd,bhtd->bht", dz.float(), z.float())
    return attention.kernel_backward(BackwardCall(query, key, value, logsumexp, dz, delta, spec), z, sums)


def tile_path(query, key, value, dz, spec, sums):
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    # The tiles also where `attention` would pick the kernels by itself.
    serve, attention.kernels_serve = attention.kernels_serve, lambda *_, **__: False
    try:
        z = attention.saliency_attention(*leaves, spec, sums=sums)
        return torch.autograd.grad(z, leaves, dz)
    finally:
        attention.kernels_serve = serve


def sdpa(query, key, value, dz, spec, _):
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    z = torch.nn.functional.scaled_dot_product_attention(
        *leaves, is_causal=True, scale=spec.scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return torch.autograd.grad(z, leaves, dz)


def milliseconds(run, repeats=5):
    times = []
    for i in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times += [begin.elapsed_time(end)] if i > 1 else []
    return statistics.median(times)


def error(ours, theirs):
    # With one token dq and dk are zero but for rounding: numbers under 0.1 are compared as they are.
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(0.1))


def check(n_tokens, shape, dtype, options):
    """Print one row; whether all is within bounds."""
    inputs = draw(n_tokens, *shape, dtype)
    tiles = random_steps(n_tokens)
    spec = AttentionSpec(shape[-1] ** -0.5, **options)
    empty = lambda: StepSums.zeros(  # noqa: E731
        tiles, shape[0], dtype=torch.float32, device=torch.device("cuda")
    )
    name = f"{n_tokens:>6} {str(shape):>14} {str(dtype)[6:]:>9} {options or 'all paths'}"
    if not attention.kernels_serve(*inputs[:3], spec, pooling=True):
        print(f"{name}: not served on this machine, tiles are used")
        return True
    first, second, expected = empty(), empty(), empty()
    grads = device_path(*inputs, spec, first)
    again = device_path(*inputs, spec, second)
    theirs = tile_path(*(x.float() for x in inputs), spec, expected)
    errors = [error(first.sums, expected.sums)] + [error(a, b) for a, b in zip(grads, theirs, strict=True)]
    same = torch.equal(first.sums, second.sums) and all(map(torch.equal, grads, again))
    kernels = milliseconds(lambda: device_path(*inputs, spec, first))
    plain = milliseconds(lambda: sdpa(*inputs, spec, first))
    fine = max(errors) < BOUNDS[dtype] and same
    print(
        f"{name}: map {errors[0]:.1e} dq {errors[1]:.1e} dk {errors[2]:.1e} dv {errors[3]:.1e}; "
        f"{'same bits' if same else 'BITS DIFFER'}; {kernels:.2f} ms, SDPA {plain:.2f} ms "
        f"({kernels / plain:.2f}){'' if fine else '  OUT OF BOUNDS'}",
        flush=True,
    )
    return fine


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2000, help="tokens of the checks (default 2000)")
    parser.add_argument("--long", type=int, default=32768, help="tokens of the timing at the end")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("No GPU here: nothing checked.")
        return 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; errors against the float32 tiles")
    torch.manual_seed(0)
    fine = True
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for options in OPTIONS:
                for n_tokens in (1, 333, arguments.tokens):
                    fine &= check(n_tokens, shape, dtype, options)
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for granularity in ("segment", "step"):
                for options in ({}, {"window": 1000}, {"softcap": 30.0}):
                    for n_tokens in (333, arguments.tokens):
                        fine &= check_bridged(n_tokens, shape, dtype, granularity, options)
    for options in OPTIONS[:2]:
        inputs = draw(arguments.long, *SHAPES[0], torch.bfloat16)
        sums = StepSums.zeros(
            random_steps(arguments.long), SHAPES[0][0], dtype=torch.float32, device=torch.device("cuda")
        )
        spec = AttentionSpec(SHAPES[0][-1] ** -0.5, **options)
        for run in (device_path, sdpa):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            duration = milliseconds(lambda run=run, call=(*inputs, spec, sums): run(*call))
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
            print(
                f"{arguments.long} tokens, 7B shape, {options or 'all paths'}, {run.__name__}: "
                f"{duration:.1f} ms, {peak:.2f} GiB"
            )
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
