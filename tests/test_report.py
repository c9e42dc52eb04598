"""The report of a run whatever its model's tasks are."""

from types import SimpleNamespace
from typing import Any, cast

from longer.report import render, summarize
from longer.storage import Version


def versions_of(test: dict[str, float | None], bins: list[dict[str, Any]], **more: Any) -> dict[str, Version]:
    """What the stages of a run leave, of a model whose first task has these metrics."""
    manifests: dict[str, dict[str, Any]] = {
        "import_events": {"num_rows": 9},
        "build_sequences": {"num_users": 2},
        "build_requests": {"num_rows": 5},
        "train": {
            **{"model_version": "m", "num_parameters": 7, "step": 4, "validation": {"task": test}},
            "history": [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}, {"step": 2, "validation": {"task": test}}],
            "settings": {"model": {}, "train": {}},
        },
        "evaluate": {"test": test, "baselines": {}, "auc_by_length": bins, **more},
        "serve": {
            **{"requests": 3, "p50_ms": 1.0, "p99_ms": 2.0, "max_abs_diff_vs_offline": 0.0, "cache": {"hits": 1}},
            "latencies_ms": [1.0, 2.0],
        },
        "batch_score": {
            **{"rows": 3, "rows_per_s": 9.0, "max_abs_diff_vs_online": None, "inputs": {"batch_scores": "b"}}
        },
    }
    found = {name: SimpleNamespace(id=name, manifest={"seconds": 1.0, **of}) for name, of in manifests.items()}
    return cast("dict[str, Version]", found)


def test_a_model_without_a_binary_task_has_a_report_of_its_error() -> None:
    versions = versions_of({"mse": 0.25}, [])
    page = render(summarize(versions), versions)
    assert "test mean squared error" in page
    assert "0.2500" in page
    assert "validation mean squared error" in page
    assert "AUC" not in page


def test_a_report_has_baselines_and_curves_of_a_binary_task() -> None:
    metrics = {"auc": 0.75, "gauc": 0.7, "logloss": 0.5, "ne": None}
    bins = [{"from": 1, "to": 9, "rows": 2, "auc": {"longer": 0.8, "popularity": 0.5}}]
    versions = versions_of(metrics, bins, baselines={"popularity": {"auc": 0.5123, "gauc": 0.5}})
    page = render(summarize(versions), versions)
    for told in (
        "test AUC",
        "test GAUC",
        "log loss",
        "0.7500",
        "0.5123",
        "validation AUC",
        "Test AUC by length of history",
    ):
        assert told in page, told
