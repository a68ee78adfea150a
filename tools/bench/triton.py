"""How fast the fused similarity and softmax is on a GPU, and how much memory it takes, beside plain torch.

    python -m tools.bench.triton [--n 131072] [--d 512] [--dtype bfloat16] [--repeats 5]

One step is what symmetric InfoNCE of n pairs asks for: log-sum-exp of the n x n similarities in both directions, and
the gradients of both tables. Useful operations are 6 n^2 d: one product of the tables forward, two backward. The fused
kernels execute 8 n^2 d, since they compute the similarities again backward. The card's rate is that of a matrix product
of 8,192 x 8,192 in the same type in the same run. Plain torch is logits and cross_entropy, at the largest n (halved
until it fits) up to the one asked for. Memory is the peak beyond the two tables. Exit code 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from mvpretrain.similarity import triton

SCALE = 100.0
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in triton.DTYPES}
Step = Callable[[Tensor, Tensor], float]


class Cost(NamedTuple):
    loss: float
    seconds: float
    peak: int  # bytes

    def __str__(self) -> str:
        return f"{self.seconds * 1e3:.1f} ms, {self.peak / 2**30:.2f} GiB, loss {self.loss:.5f}"


def fused_step(image: Tensor, text: Tensor) -> float:
    """Symmetric InfoNCE of n pairs and its gradients, by the fused kernels."""
    n = len(image)
    scale = torch.tensor([SCALE], device=image.device)
    valid = torch.ones(n, dtype=torch.bool, device=image.device)
    row_lse, _, column_lse, _ = triton.forward(image, text, scale, valid, valid)
    assert column_lse is not None
    share = torch.full((n,), 0.5 / n, device=image.device)
    grads = triton.backward(image, text, scale, valid, valid, None, None, row_lse, column_lse, share, share)
    for grad, other in zip(grads, (text, image)):
        grad.sub_(other, alpha=1 / n).mul_(scale)
    positive = SCALE * (image.float() * text.float()).sum(dim=1)
    return float(((row_lse + column_lse) / 2 - positive).mean())


def torch_step(image: Tensor, text: Tensor) -> float:
    """The same by logits and cross_entropy."""
    leaves = [x.detach().requires_grad_() for x in (image, text)]
    logits = SCALE * leaves[0] @ leaves[1].T
    target = torch.arange(len(image), device=image.device)
    loss = (cross_entropy(logits.float(), target) + cross_entropy(logits.T.float(), target)) / 2
    loss.backward()
    return float(loss.detach())


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The median over repeats, after one that compiles and warms up."""
    work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def cost(step: Step, n: int, d: int, dtype: torch.dtype, repeats: int) -> Cost:
    """What a step on n random pairs costs. torch.OutOfMemoryError: they do not fit."""
    make = torch.Generator("cuda").manual_seed(0)
    text = normalize(torch.randn(n, d, generator=make, device="cuda"), dim=1)
    image = normalize(text + torch.randn(n, d, generator=make, device="cuda") / d**0.5, dim=1).to(dtype)
    text = text.to(dtype)
    loss = step(image, text)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(image, text)
    peak = torch.cuda.max_memory_allocated() - before
    return Cost(loss, seconds(lambda: step(image, text), repeats), peak)


def largest(step: Step, n: int, d: int, dtype: torch.dtype, repeats: int) -> tuple[int, Cost]:
    """The largest of n, n / 2, n / 4, ... that fits, and what it costs."""
    while True:
        try:
            return n, cost(step, n, d, dtype, repeats)
        except torch.OutOfMemoryError:
            if n == 1:
                raise
        torch.cuda.empty_cache()
        n //= 2


def matrix_rate(dtype: torch.dtype, repeats: int, side: int = 8192) -> float:
    """Operations a second of torch's product of two square matrices."""
    a, b = (torch.randn(side, side, device="cuda").to(dtype) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b, repeats)


def report(n: int, d: int, dtype: torch.dtype, repeats: int) -> None:
    card = matrix_rate(dtype, repeats)
    print(f"{torch.cuda.get_device_name()}, {dtype}: {card / 1e12:.0f} TFLOP/s by a product of 8,192 x 8,192")
    found = cost(fused_step, n, d, dtype, repeats)
    useful = 6 * n * n * d / found.seconds
    print(f"fused, n {n:,}, d {d}: {found}")
    print(f"  useful (6 n^2 d) {useful / 1e12:.0f} TFLOP/s, {useful / card:.0%} of the card's rate", end="")
    print(f"; executed (8 n^2 d) {useful * 8 / 6 / 1e12:.0f} TFLOP/s, {useful * 8 / 6 / card:.0%}")
    fits, other = largest(torch_step, n, d, dtype, repeats)
    print(f"torch, n {fits:,} (the largest that fits, up to {n:,}): {other}")
    same = found if fits == n else cost(fused_step, fits, d, dtype, repeats)
    print(f"fused, n {fits:,}: {same}")
    print(f"  {other.seconds / same.seconds:.2f} times as fast, {other.peak / same.peak:.1f} times less memory")


def natural(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a number above 0")
    return value


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=natural, default=131_072, help="pairs (131072)")
    parser.add_argument("--d", type=natural, default=512, help="dimensions (512)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="type of the tables (bfloat16)")
    parser.add_argument("--repeats", type=natural, default=5, help="steps to time; the median counts (5)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tools.bench.triton measures on a GPU, and torch sees no CUDA device here.")
        return 2
    probe = torch.empty(1, args.d, dtype=DTYPES[args.dtype], device="cuda")
    if not triton.usable(probe, probe):
        print(f"The fused kernels do not take d {args.d} in {args.dtype} on {torch.cuda.get_device_name()}.")
        return 2
    report(args.n, args.d, DTYPES[args.dtype], args.repeats)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
