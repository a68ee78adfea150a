"""The report of an export, on shards whose classes the raw inputs show."""

from __future__ import annotations

import json

import pytest
import torch

from mvpretrain.export.write import export_run
from mvpretrain.report import drawing, evaluate
from mvpretrain.report.evaluate import evaluate_export
from mvpretrain.types import View
from tests.runs import make_run, make_shards, settings


def test_report_measures_every_pair_and_view(tmp_path, capsys):
    make_shards(tmp_path, train=120, test=60)
    out = export_run(make_run(tmp_path), tmp_path / "out")
    found = evaluate_export(out)
    assert json.loads((out / "report/report.json").read_text()) == found
    pairs = {(p["from"], p["to"]): p for p in found["retrieval"]}
    assert len(pairs) == 6 and found["samples"] == 60
    assert pairs["left", "right"]["chance"] == pytest.approx(1 / 59)  # the unreadable sample is no candidate
    assert pairs["left", "text"]["by_label"] and not pairs["left", "right"]["by_label"]
    assert pairs["text", "left"]["chance"] > 0.25
    probes = {p["view"]: p for p in found["probes"]}
    assert list(probes) == ["left", "right", "text"]
    assert probes["left"]["linear"]["raw"] > 0.8 and probes["text"]["linear"]["raw"] > 0.9
    assert probes["left"]["train"] == 119 and probes["text"]["test"] == sum(i % 7 != 0 and i != 5 for i in range(60))
    assert all(0 <= x <= 1 for p in probes.values() for x in [*p["linear"].values(), *p["knn"].values()])
    assert found["samples_per_second"] == 60
    page = (out / "report/report.md").read_text()
    assert "| left | text |" in page and "| label |" in page and "60 samples a second" in page
    assert (out / "report/report.png").stat().st_size > 10_000
    assert "Probes on the features before the head" in capsys.readouterr().out
    assert evaluate_export(out) == found


def test_one_exported_view_of_unlabelled_data_has_nothing_to_compare(tmp_path):
    make_shards(tmp_path)
    changes = settings(tmp_path)
    data = {**changes["data"], "label": None}
    out = export_run(make_run(tmp_path, data=data, evaluation={}), tmp_path / "out", views=["left", "right"])
    found = evaluate_export(out, run=tmp_path / "nowhere")
    assert len(found["retrieval"]) == 2 and found["probes"] == [] and found["samples_per_second"] is None


def test_no_evaluation_data_is_said(tmp_path):
    data = {**settings(tmp_path)["data"], "eval": None}
    out = export_run(make_run(tmp_path, data=data), tmp_path / "out")
    with pytest.raises(ValueError, match=r"names no data\.eval"):
        evaluate_export(out)


def test_raw_inputs():
    images = torch.rand(2, 3, 64, 64)
    pooled = evaluate.raw_features(View(images))
    assert pooled.shape == (2, 3 * 32 * 32)
    assert pooled[1, 0] == pytest.approx(float(images[1, 0, :2, :2].mean()), rel=1e-5)
    assert evaluate.raw_features(View(torch.rand(2, 1, 8, 8))).shape == (2, 64)
    assert evaluate.raw_features(View(torch.rand(2, 9000, 1))).shape == (2, 4096)
    tokens = View(torch.tensor([[5, 7, 5, 2050]]), torch.tensor([[True, True, True, False]]))
    counts = evaluate.raw_features(tokens)
    assert counts.shape == (1, 2048) and counts[0, 5] == 2 and counts.sum() == 3


def test_many_views_become_a_matrix():
    names = [f"lead{i}" for i in range(6)]
    figures = {"by_label": False, "R@1": 0.5, "R@5": 0.6, "R@10": 0.7, "median_rank": 1.0, "chance": 0.1, "queries": 9}
    pairs = [{"from": u, "to": v, **figures} for u in names for v in names if u != v]
    drawn = drawing.figure({"samples": 9, "retrieval": pairs, "probes": []})
    assert len(drawn.axes) == 1 and drawn.axes[0].get_images()
    assert len(drawn.axes[0].texts) == 30
