"""Check the GPU path against the tiles of plain PyTorch on random inputs, and time both.

    python benchmarks/gpu_check.py [--tokens 4096] [--long 32768]

Every row is one attention call, forward and backward: the largest error of the pooled map, dq, dk and dv
relative to the largest number of each, and milliseconds (median of five after two to warm up) next to
PyTorch's own SDPA forward and backward. bfloat16 is compared with the float32 tiles on the same numbers.
Exits with 1 if an error is out of bounds or two runs differ in a bit. Without a GPU it says so and exits
with 0.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch

from stepflow_tl.saliency.fused import attention
from stepflow_tl.saliency.fused.call import AttentionSpec, BackwardCall
from stepflow_tl.saliency.fused.steps import StepSums, StepTiles

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


def device_path(query, key, value, dz, spec, sums):
    """Forward and backward by the kernels; the tiles' forward where flash does not serve."""
    if attention.flash_serves(query, key, value, spec):
        z, logsumexp = attention.flash_forward(query, key, value, spec.scale)
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
