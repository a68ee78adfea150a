"""The multi-marginal matching gap, loss and gradient: ours against OTT-JAX's MMSinkhorn, on the same rows, in one go.

    python -m tools.bench.transport                  # k = 3 and 4 against OTT-JAX, then larger batches of ours alone
    python -m tools.bench.transport --cores 1        # where other work shares the machine, spread over one core each
    python -m tools.bench.transport --device cuda    # ours on a GPU, as a share of its matrix rate; add --tf32

Ours stops where the gradient is estimated to be right to 1e-3, theirs at a marginal error of 1e-3, in float32; OTT's is
jitted and compiled before, ours has run on a small batch before. Every side runs in a process of its own. Time: the
best of the repeats. Memory: the peak of the process above what it held before loss and gradient (on a GPU, of its
allocator). Ratios are theirs over ours. OTT-JAX is no dependency: `pip install "ott-jax>=0.6"`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import os
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mvpretrain import objectives
from mvpretrain.types import Embeddings
from tools.bench.child import Memory, answer, ask

EPSILON, TOLERANCE = 0.2, 1e-3  # of the gradient, relative, and of their marginals
AGAINST = ((3, 128), (3, 256), (4, 32), (4, 64))
LARGER = {"cpu": ((3, 2048), (4, 256)), "cuda": ((3, 4096), (3, 8192), (4, 512), (4, 1024))}


class Measured(NamedTuple):
    seconds: float
    mib: float
    loss: float
    gradient: float  # its norm along the spheres
    steps: float  # ours of Newton's method, theirs sweeps
    error: float  # ours of the gradient, as estimated, theirs of the marginals


def points(k: int, n: int, dim: int) -> list[Tensor]:
    """Views of n samples that share a half of their direction."""
    make = torch.Generator().manual_seed(0)
    common = torch.randn(n, dim, generator=make)
    return [normalize(common + torch.randn(n, dim, generator=make), dim=1) for _ in range(k)]


def ours(k: int, n: int, options: argparse.Namespace) -> Measured:
    device = torch.device(options.device)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    views = [f"view{u}" for u in range(k)]
    settings = {"kind": "m3g", "epsilon": EPSILON, "tolerance": TOLERANCE}
    objective = objectives.build(settings, views)

    def run(x: list[Tensor]) -> tuple[Any, list[Tensor]]:
        z = {v: rows.detach().to(device).requires_grad_() for v, rows in zip(views, x)}
        present = dict.fromkeys(views, torch.ones(len(x[0]), dtype=torch.bool, device=device))
        ids = torch.arange(len(x[0]), device=device)
        losses = objective(whole := Embeddings(z, ids, present, ids), whole)
        losses.total.backward()
        return losses, [rows.grad for rows in z.values() if rows.grad is not None]

    run(points(k, 8, options.dim))
    x = points(k, n, options.dim)
    memory = Memory(device)
    seconds, (losses, gradients) = best(lambda: run(x), options.repeats, device)
    parts = {name: float(part) for name, part in losses.parts.items()}
    norm = along_spheres([g.cpu() for g in gradients], x)
    return Measured(seconds, memory.peak() / 2**20, parts["gap"], norm, parts["newton_steps"], parts["gradient_error"])


def theirs(k: int, n: int, options: argparse.Namespace) -> Measured:
    jax: Any = importlib.import_module("jax")
    solver: Any = importlib.import_module("ott.experimental.mmsinkhorn").MMSinkhorn(threshold=TOLERANCE)

    def gap(x: tuple[Any, ...]) -> tuple[Any, Any]:
        out = solver(x, epsilon=k**2 * EPSILON)  # their cost is not divided by k^2
        true = sum(((u - v) ** 2).sum(1).mean() for u, v in combinations(x, 2))
        return (true - out.ent_reg_cost) / k**2, (out.n_iters, out.errors)

    x = points(k, n, options.dim)
    given = tuple(jax.numpy.asarray(rows.numpy()) for rows in x)
    compiled = jax.jit(jax.value_and_grad(gap, has_aux=True)).lower(given).compile()
    memory = Memory(torch.device("cpu"))
    seconds, found = best(lambda: jax.block_until_ready(compiled(given)), options.repeats, torch.device("cpu"))
    (value, (sweeps, errors)), gradients = found
    mib = memory.peak() / 2**20
    norm = along_spheres([torch.tensor(jax.device_get(g)) for g in gradients], x)
    loss = float(value) - EPSILON * math.log(n)
    return Measured(seconds, mib, loss, norm, float(sweeps), float(errors[errors >= 0][-1]))


def best(call: Callable[[], Any], repeats: int, device: torch.device) -> tuple[float, Any]:
    """(seconds of the fastest call, what the last returned)."""
    fastest, found = math.inf, None
    for _ in range(repeats):
        found = None
        start = time.perf_counter()
        found = call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest, found


def along_spheres(gradients: list[Tensor], x: list[Tensor]) -> float:
    """The norm of a gradient without its parts along the rows, which unit vectors do not see."""
    parts = [g - (g * rows).sum(1, keepdim=True) * rows for g, rows in zip(gradients, x)]
    return float(torch.cat(parts).norm())


def matrix_rate(options: argparse.Namespace, n: int) -> float:
    """Multiplications and additions a second in a product of two n x n matrices."""
    device = torch.device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    a = torch.randn(n, n, device=device)
    best(lambda: a @ a, 2, device)
    return 2 * n**3 / best(lambda: a @ a, 10, device)[0]


def measured(side: str, k: int, n: int, options: argparse.Namespace) -> Measured:
    own = ["--child", side, str(k), str(n), "--dim", str(options.dim), "--repeats", str(options.repeats)]
    own += ["--device", options.device, "--cores", str(options.cores), *(["--tf32"] if options.tf32 else [])]
    return Measured(*ask("tools.bench.transport", own))


def row(side: str, m: Measured, more: str = "") -> None:
    figures = f"{m.seconds:10.4f}{m.mib:10.1f}{m.loss:11.6f}{m.gradient:12.4e}{m.steps:8g}{m.error:10.1e}"
    print(f"  {side:10}{figures}{more}", flush=True)


def compare(options: argparse.Namespace) -> None:
    for k, n in AGAINST:
        own, other = (measured(side, k, n, options) for side in ("ours", "OTT-JAX"))
        print(f"k = {k}, n = {n}")
        row("ours", own)
        ratios = f"   time x {other.seconds / own.seconds:.1f}, memory x {other.mib / max(own.mib, 0.1):.1f}"
        row("OTT-JAX", other, ratios)


def larger(options: argparse.Namespace) -> None:
    for k, n in LARGER[options.device]:
        own, rate = measured("ours", k, n, options), matrix_rate(options, 4096 if options.device == "cuda" else 1024)
        done = 2 * n**k * (k + 3 + 3 * own.steps) / own.seconds
        print(f"k = {k}, n = {n}: {done / 1e9:.0f} GFLOP/s, {done / rate:.2f} of the matrix rate")
        row("ours", own)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="that each side may use")
    parser.add_argument("--tf32", action="store_true", help="let a GPU round the factors of products to 10 bits")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    if options.child:
        side, k, n = options.child
        found = (ours if side == "ours" else theirs)(int(k), int(n), options)
        answer(found)
    print(f"{'':12}{'seconds':>10}{'MiB':>10}{'loss':>11}{'gradient':>12}{'steps':>8}{'error':>10}")
    if options.device == "cpu" and importlib.util.find_spec("ott"):
        compare(options)
    elif options.device == "cpu":
        print('OTT-JAX is not installed, so only our side runs: pip install "ott-jax>=0.6"')
    larger(options)


if __name__ == "__main__":
    main()
