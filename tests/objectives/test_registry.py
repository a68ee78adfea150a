"""What every objective must do, for every kind behind the registry: a new file is covered as soon as it is there.

Its own tests, `test_KIND.py` beside this file, may name VARIANTS (more settings to try), REQUIRED (settings without a
default) and VIEWS (the numbers of views that it takes, where not any).
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mvpretrain.distributed import sample_state
from mvpretrain.objectives import registry
from mvpretrain.types import Embeddings, Losses
from tests.objectives.towers import build, outcome, outcome_on, relative_errors
from tests.tables import ROWS, leaves, names, table

HERE = Path(__file__).parent
OWN = {k: import_module(f"tests.objectives.test_{k}") for k in registry.kinds() if (HERE / f"test_{k}.py").exists()}
VIEWS: dict[str, tuple[int, ...]] = {kind: getattr(own, "VIEWS", (2, 3, 4, 5)) for kind, own in OWN.items()}
CONFIGS = [
    {"kind": kind, **getattr(own, "REQUIRED", {}), **more}
    for kind, own in OWN.items()
    for more in ({}, *getattr(own, "VARIANTS", []))
]
config_of = pytest.mark.parametrize("config", CONFIGS, ids=str)
config_and_k = pytest.mark.parametrize(("config", "k"), [(c, k) for c in CONFIGS for k in VIEWS[c["kind"]]], ids=str)
# The fewest views, the most, and 3: what holds for these holds between them.
config_and_some_k = pytest.mark.parametrize(
    ("config", "k"),
    [(c, k) for c in CONFIGS for k in VIEWS[c["kind"]] if k in (min(VIEWS[c["kind"]]), 3, max(VIEWS[c["kind"]]))],
    ids=str,
)


def some_k(config: dict[str, Any]) -> int:
    return min(VIEWS[config["kind"]], key=lambda k: abs(k - 3))


def value(config: dict[str, Any], whole: Embeddings) -> Losses:
    """A new objective's losses on one table in one process."""
    dim = next(iter(whole.z.values())).shape[1]
    return build(config, len(whole.z), torch.float32, dim=dim)(whole, whole)


def assert_finite(losses: Losses, whole: Embeddings) -> None:
    assert losses.total.isfinite()
    assert all(x.isfinite() for x in losses.parts.values()), losses.parts
    losses.total.backward()
    assert all(z.grad is None or z.grad.isfinite().all() for z in whole.z.values())


def test_every_kind_has_tests_of_its_own():
    assert set(OWN) == set(registry.kinds())


@config_and_k
def test_builds_and_gives_scalars_and_gradients(config, k):
    whole = leaves(table(k))
    settings = registry.parse(config)
    assert settings.memory(k, ROWS, ROWS, 8) > 0
    objective = build(config, k, torch.float32)
    losses = objective(whole, whole)
    assert losses.total.shape == () and losses.total.dtype == torch.float32
    for name, part in losses.parts.items():
        assert part.shape == () and not part.requires_grad, name
    assert_finite(losses, whole)
    assert all(z.grad is not None and z.grad.abs().sum() > 0 for z in whole.z.values())
    # DeepSpeed 0.19.8 takes no parameter without a dimension.
    parameters = objective.parameters() if isinstance(objective, nn.Module) else []
    assert all(p.ndim > 0 and p.is_contiguous() for p in parameters)


@config_of
def test_mean_over_ranks_is_the_value_and_gradient_of_one_process(ranks, config):
    k = some_k(config)
    wanted = outcome(config, k, torch.float32, steps=2)
    for size in (2, 3, 4):
        for found in ranks(size).run(outcome_on, config, k, torch.float32, 2, size):
            assert found.values == pytest.approx(wanted.values, rel=1e-5, abs=1e-6), f"{size} ranks"
            errors = relative_errors(found.gradients, wanted.gradients)
            assert max(errors.values()) < 1e-4, (f"{size} ranks", errors)


@config_of
def test_matching_views_are_worth_less_than_mismatched_ones(config):
    k = some_k(config)
    rows = torch.eye(ROWS)
    matching = table(k, plain=True)._replace(z=dict.fromkeys(names(k), rows))
    mismatched = matching._replace(z={v: rows.roll(i, 0) for i, v in enumerate(names(k))})
    assert value(config, matching).total < value(config, mismatched).total - 1e-3


@config_and_some_k
def test_order_of_samples_does_not_matter(config, k):
    whole = table(k)
    shuffled = whole.rows(torch.randperm(ROWS, generator=torch.Generator().manual_seed(4)))
    torch.testing.assert_close(value(config, shuffled).total, value(config, whole).total, rtol=1e-5, atol=1e-6)


@config_and_some_k
def test_what_an_absent_view_holds_does_not_matter(config, k):
    whole = leaves(table(k))
    losses = value(config, whole)
    losses.total.backward()
    other = table(k, seed=9)
    z = {v: torch.where(whole.present[v][:, None], whole.z[v], other.z[v]) for v in whole.z}
    torch.testing.assert_close(value(config, whole._replace(z=z)).total, losses.total, rtol=1e-6, atol=1e-6)
    for v, z in whole.z.items():
        assert z.grad is not None and (z.grad[~whole.present[v]] == 0).all(), v


@config_and_some_k
def test_rows_absent_in_every_view_count_nowhere(config, k):
    whole = table(k)
    longer = whole.pad(ROWS + 5)
    torch.testing.assert_close(value(config, longer).total, value(config, whole).total, rtol=1e-6, atol=1e-6)


def extremes(k: int) -> dict[str, Embeddings]:
    """Tables at which a root, a logarithm or a quotient could give no number."""
    whole, nobody = table(k), torch.zeros(ROWS, dtype=torch.bool)
    return {
        "identical rows": whole._replace(z={v: z[:1].expand(ROWS, -1) for v, z in whole.z.items()}),
        "one id": whole._replace(ids=torch.full((ROWS,), -5)),
        "view missing": whole._replace(present=whole.present | {names(k)[-1]: nobody}),
        "all missing": whole._replace(present=dict.fromkeys(names(k), nobody)),
        "one row": whole.rows(slice(1, 2)),
        "opposite": whole._replace(z={v: whole.z[names(k)[0]] * (-1) ** i for i, v in enumerate(names(k))}),
    }


@config_and_some_k
def test_extremes_stay_finite(config, k):
    for problem, whole in extremes(k).items():
        whole = leaves(whole)
        try:
            assert_finite(value(config, whole), whole)
        except Exception as error:
            error.add_note(f"the table: {problem}")
            raise


@config_of
def test_half_precision_is_refused_or_computed_well(config):
    whole = table(some_k(config))
    rounded = whole._replace(z={v: z.bfloat16() for v, z in whole.z.items()})
    wanted = value(config, whole._replace(z={v: z.float() for v, z in rounded.z.items()})).total
    try:
        found = value(config, rounded).total
    except (RuntimeError, TypeError, ValueError):
        return
    torch.testing.assert_close(found.float(), wanted, rtol=1e-3, atol=1e-3)


@config_of
def test_state_is_saved_and_loaded(config, tmp_path):
    k = some_k(config)
    first, second = build(config, k, torch.float32), build(config, k, torch.float32)
    if not isinstance(first, nn.Module) or not isinstance(second, nn.Module):
        pytest.skip("an objective that is no module has no state")
    with torch.no_grad():
        for p in first.parameters():
            p += 0.1
    first(table(k), table(k))
    second.load_state_dict(first.state_dict())
    sample_state.save(first, tmp_path, 0)
    sample_state.restore(second, tmp_path)
    torch.testing.assert_close(second(table(k, 1), table(k, 1)).total, first(table(k, 1), table(k, 1)).total)
