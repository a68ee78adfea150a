"""Export formats: every kind proves itself against the run, and a user's own class is one as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mvpretrain.export.encoder import load
from mvpretrain.export.formats import Format, Trained, registry
from mvpretrain.export.write import export_run
from mvpretrain.types import View
from tests.runs import make_run


class Pickled:
    """A user's format: whole towers in one file, embeddings off by `error`."""

    def __init__(self, error: float = 0.0):
        self.error = error

    def write(self, folder: Path, trained: Mapping[str, Trained]) -> None:
        torch.save(dict(trained), folder / "towers.pt")

    @torch.no_grad()
    def embed(self, folder: Path, view: str, values: Sequence[Any]) -> Tensor:
        trained = torch.load(folder / "towers.pt", weights_only=False)[view]
        transform = trained.view.build(train=False)
        rows = trained.tower(View.stack([transform(value) for value in values]))
        return rows / rows.norm(dim=1, keepdim=True) + self.error

    def usage(self, name: str, view: str) -> str:
        return f"Unpickle {name}/towers.pt and take {view!r}."


@pytest.mark.parametrize("kind", registry.kinds())
def test_every_kind_is_one_that_the_command_takes(kind: str, tmp_path: Path) -> None:
    assert isinstance(registry.parse({"kind": kind}).build(), Format)
    out = export_run(make_run(tmp_path), tmp_path / "out", ["text"], format=kind)
    assert "difference after reading back" in (out / "README.md").read_text()


def test_a_users_own_format(tmp_path: Path) -> None:
    run, kind = make_run(tmp_path), "tests.export.test_formats:Pickled"
    with pytest.raises(ValueError, match=r"export format kind .*Pickled' runs code .* add --trust"):
        export_run(run, tmp_path / "out", format=kind)
    out = export_run(run, tmp_path / "out", format=kind, trust=True)
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "recipe.yaml", "towers.pt"]
    assert "Unpickle out/towers.pt and take 'left'." in (out / "README.md").read_text()
    with pytest.raises(ValueError, match="is no export"):
        load(out)
    with pytest.raises(ValueError, match=r"'left', read back, embeds otherwise .* differs by 0\.01, at most 1e-05"):
        export_run(run, tmp_path / "wrong", format={"kind": kind, "error": 0.01}, trust=True)
    with pytest.raises(ValueError, match=r"unknown key 'eror'; did you mean 'error'"):
        export_run(run, tmp_path / "wrong", format={"kind": kind, "eror": 0.01}, trust=True)
    with pytest.raises(ValueError, match=r"has no write, embed, usage; see mvpretrain\.export\.formats"):
        export_run(run, tmp_path / "wrong", format="tests.export.test_write:Own", trust=True)
    with pytest.raises(ValueError, match="unknown export format kind 'onw'; did you mean 'own'"):
        export_run(run, tmp_path / "wrong", format="onw")
    assert not (tmp_path / "wrong").exists()
