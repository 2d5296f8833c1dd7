"""The table of metrics, and one more metric in it: everything that shows or uses metrics takes it from there."""

import copy

import numpy as np
import pytest
import torch
from wds_folder import picture, tiny_model, write_folder, zero_shot

from focalclip.base.errors import UserError
from focalclip.base.strict import from_dict
from focalclip.evaluation.compare import compare, mcnemar_exact
from focalclip.evaluation.metrics import METRICS, Metric, find_metric
from focalclip.evaluation.metrics.definitions import accuracy
from focalclip.evaluation.metrics.intervals import wilson_interval
from focalclip.evaluation.result import Result
from focalclip.evaluation.scoring import metric_value, score, score_matrix
from focalclip.evaluation.task import Benchmark, Task
from focalclip.reports import write_report
from focalclip.reports.tables import result_table

NAMES = ("cat", "dog", "ankle boot", "fire engine", "owl", "bus", "tree")

TOP2 = Metric(
    name="top2",
    title="top-2 accuracy",
    definition=lambda answers, weights: accuracy(answers.true_rank < 2, weights),
    correct=lambda answers: answers.true_rank < 2,
    chance=lambda answers: 2 / answers.num_classes,
)

RECIPROCAL = Metric(  # no chance level and no interval of its own
    name="mrr",
    title="mean reciprocal rank",
    definition=lambda answers, weights: (
        (np.ones((1, answers.n)) if weights is None else weights) @ (1 / (1 + answers.true_rank)) / answers.n
    ),
)


@pytest.fixture
def more_metrics(monkeypatch):
    for metric in (TOP2, RECIPROCAL):
        monkeypatch.setitem(METRICS, metric.name, metric)


def test_names_titles_and_kinds_of_label():
    kinds = {name: (metric.title, metric.labels) for name, metric in METRICS.items()}
    assert kinds == {
        "accuracy": ("accuracy", "single"),
        "mean_per_class": ("mean per class", "single"),
        "map_11point": ("11-point mAP", "multilabel"),
        "map_11point_voc": ("11-point mAP, VOC's", "multilabel"),
        "map": ("mAP", "multilabel"),
        "roc_auc": ("ROC AUC", "binary"),
        "macro_f1": ("macro F1", "single"),
    }
    assert all(find_metric(name).name == name for name in METRICS)


def test_a_task_with_an_unknown_metric_is_refused_with_the_nearest():
    with pytest.raises(
        UserError, match=r"mine\.yaml: metric: .*no metric 'mean_per_clas'; did you mean mean_per_class"
    ):
        from_dict(Task, {"id": "t", "metric": "mean_per_clas"}, "mine.yaml")
    with pytest.raises(ValueError, match="known: accuracy, mean_per_class, map_11point"):
        Task(id="t", metric="x")


@pytest.mark.parametrize(
    ("metric", "labels", "message"),
    [
        ("roc_auc", [1, 1, 1], "roc_auc needs images of both classes"),
        ("map", [[False, False]] * 3, "map needs positive labels"),
    ],
)
def test_labels_that_cannot_be_scored_are_refused(metric, labels, message):
    with pytest.raises(UserError, match=message):
        score(Task(id="t", metric=metric), torch.eye(3, 2), torch.eye(2), np.array(labels))


def test_another_metric_is_scored_with_its_own_interval_and_chance(more_metrics):
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(200, 7)), rng.integers(7, size=200)
    ranks = np.array([list(np.argsort(-row)).index(label) for row, label in zip(scores, labels, strict=True)])
    top2 = score_matrix(Task(id="t", metric="top2"), scores, labels)
    assert top2.value == (ranks < 2).mean()
    assert top2.interval == wilson_interval(int((ranks < 2).sum()), 200)
    assert (top2.chance, top2.extras) == (2 / 7, {})
    mrr = score_matrix(Task(id="t", metric="mrr"), scores, labels)
    assert mrr.value == metric_value("mrr", scores, labels) == pytest.approx((1 / (1 + ranks)).mean(), abs=1e-12)
    assert mrr.interval[0] < mrr.value < mrr.interval[1]
    assert mrr.chance == pytest.approx(np.mean(1 / np.arange(1, 8)), abs=0.03)  # every rank is as likely


def test_another_metric_is_kept_compared_and_shown(more_metrics, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("top2", "mrr"):
        images = [picture(i) for i in range(40)]
        write_folder(tmp_path / name, rng.integers(7, size=40).tolist(), names=NAMES, images=images, shard_size=40)
    benchmark = Benchmark("two", "wds", tuple(Task(id=name, metric=name) for name in ("top2", "mrr")), tmp_path)
    model = copy.deepcopy(tiny_model())
    zero_shot(model, benchmark).write(tmp_path / "a.json")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    zero_shot(model, benchmark).write(tmp_path / "b.json")
    a, b = Result.read(tmp_path / "a.json"), Result.read(tmp_path / "b.json")  # checked against the predictions
    assert "top-2 accuracy" in result_table(a)
    assert "mean reciprocal rank" in write_report(a, tmp_path / "a.html").read_text()
    comparison = compare(tmp_path / "a.json", tmp_path / "b.json", progress=False)
    tasks = comparison.tasks
    right = [result.tasks["top2"].predictions.true_rank < 2 for result in (a, b)]
    only = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    assert (tasks["top2"].only_a, tasks["top2"].only_b) == only
    assert (tasks["top2"].test, tasks["top2"].p) == ("McNemar exact", mcnemar_exact(*only))
    assert (tasks["mrr"].test, tasks["mrr"].metric) == ("paired bootstrap", "mean reciprocal rank")
