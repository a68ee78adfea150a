"""How far M3G's gradient is from the converged one on trained towers: sweeps alone, and the solver as it is.

    python -m tools.bench.convergence MFEAT_FOLDER [--cases 3,64,0.1 4,20,0.1 ...]

Six linear towers are trained on UCI Multiple Features by InfoNCE for 400 steps; the rows are held-out ones. A case is
views, rows and temperature. The converged gradient is that of float64 with a tolerance of 1e-10; all others are
float32, one thread, time of loss and gradient the best of five.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from mvpretrain import objectives
from mvpretrain.types import Embeddings

VIEWS = ("fou", "fac", "kar", "pix", "zer", "mor")
CASES = ("2,64,0.05", "3,64,0.1", "3,256,0.05", "3,256,0.1", "4,20,0.1", "4,20,0.2", "4,64,0.1", "6,8,0.05", "6,8,0.2")
SIDES = {
    "10 sweeps": {"max_steps": 0, "sweeps": 10},
    "100 sweeps": {"max_steps": 0, "sweeps": 100},
    "default": {},
}


def trained(folder: Path, steps: int = 400, dim: int = 32) -> Tensor:
    """Held-out rows through trained towers: `6 400 dim`, unit rows."""
    rows = [np.loadtxt(folder / f"mfeat-{name}.csv", delimiter=",", skiprows=1)[:, :-1] for name in VIEWS]
    x = [torch.tensor((r - r.mean(0)) / (r.std(0) + 1e-6), dtype=torch.float32) for r in rows]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x[0]), generator=generator)
    weights = [nn.Parameter(torch.randn(r.shape[1], dim, generator=generator) / r.shape[1] ** 0.5) for r in x]
    optimizer = torch.optim.AdamW(weights, lr=3e-3)
    for _ in range(steps):
        batch = order[torch.randperm(1600, generator=generator)[:128]]
        z = [normalize(r[batch] @ w, dim=1) for r, w in zip(x, weights)]
        logits = [z[u] @ z[v].T / 0.1 for u, v in combinations(range(len(z)), 2)]
        loss = torch.stack([cross_entropy(s, torch.arange(128)) for s in logits]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.stack([normalize(r[order[1600:]] @ w.detach(), dim=1) for r, w in zip(x, weights)])


def gradient(rows: Tensor, temperature: float, **settings: float) -> tuple[Tensor, dict[str, Tensor], float]:
    """(gradient in all rows, parts of the loss, seconds)."""
    views = [f"view{i}" for i in range(len(rows))]
    z = {v: x.clone().requires_grad_() for v, x in zip(views, rows)}
    n = rows.shape[1]
    present = dict.fromkeys(views, torch.ones(n, dtype=torch.bool))
    whole = Embeddings(z=z, ids=torch.arange(n), present=present, labels=torch.full((n,), -1))
    objective = objectives.build({"kind": "m3g", "temperature": temperature, **settings}, views)
    begin = time.perf_counter()
    losses = objective(whole, whole)
    found = torch.autograd.grad(losses.total, list(z.values()))
    seconds = time.perf_counter() - begin
    return torch.cat([g.double().flatten() for g in found]), losses.parts, seconds


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.convergence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="UCI Multiple Features as mfeat-*.csv")
    parser.add_argument("--cases", nargs="+", default=CASES, help="views,rows,temperature")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = trained(options.folder)
    print("k, n, temperature   side          off by    estimate   Newton steps        ms")
    for case in options.cases:
        k, n, temperature = (kind(x) for kind, x in zip((int, int, float), case.split(",")))
        own = rows[:k, :n]
        wanted = gradient(own.double(), temperature, tolerance=1e-10, max_steps=200)[0]
        for side, settings in SIDES.items():
            found, parts, _ = gradient(own, temperature, **settings)
            ms = 1000 * min(gradient(own, temperature, **settings)[2] for _ in range(5))
            off, said = float((found - wanted).norm() / wanted.norm()), float(parts["gradient_error"])
            print(f"{case:<19} {side:<12} {off:>7.2%} {said:>11.2%} {int(parts['newton_steps']):>14} {ms:>9.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
