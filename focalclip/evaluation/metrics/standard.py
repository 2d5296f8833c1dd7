"""The metrics of ELEVATER, CLIP_benchmark, DataComp and WILDS as records."""

from functools import partial

import numpy as np

from focalclip.evaluation.metrics.definitions import (
    Floats,
    accuracy,
    macro_f1,
    map_11point,
    mean_average_precision,
    mean_per_class,
    roc_auc,
)
from focalclip.evaluation.metrics.metric import Answers, Metric, answer_extras

_MAPS = {
    "map_11point": map_11point,
    "map_11point_voc": partial(map_11point, end_point=False),
    "map": mean_average_precision,
}


def _map(name: str, answers: Answers, weights: Floats | None) -> Floats:
    return _MAPS[name](answers.ranked, answers.labels, weights)


def _every_map(answers: Answers) -> dict[str, float]:
    """Every kind of mAP on everything that ranks, since published numbers mix them."""
    return {
        f"{name}_{ranking}": float(function(matrix, answers.labels)[0])
        for name, function in _MAPS.items()
        for ranking, matrix in answers.rankings.items()
    }


def _margin(answers: Answers) -> Floats:
    """Class 1 is the positive one; of two classes the softmax ranks as the difference of the scores does."""
    return answers.scores[:, 1].astype(np.float64) - answers.scores[:, 0]


METRICS = (
    Metric(
        name="accuracy",
        title="accuracy",
        definition=lambda answers, weights: accuracy(answers.predicted == answers.labels, weights),
        correct=lambda answers: answers.predicted == answers.labels,
        chance=lambda answers: 1 / answers.num_classes,
        extras=answer_extras,
    ),
    Metric(
        name="mean_per_class",
        title="mean per class",
        definition=lambda answers, weights: mean_per_class(
            answers.predicted == answers.labels, answers.labels, weights
        ),
        among_candidates=True,
        chance=lambda answers: 1 / answers.num_candidates,
        extras=answer_extras,
    ),
    *(
        Metric(
            name=name,
            title=title,
            definition=partial(_map, name),
            labels="multilabel",
            reads_scores=True,
            extras=_every_map,
        )
        for name, title in {
            "map_11point": "11-point mAP",
            "map_11point_voc": "11-point mAP, VOC's",
            "map": "mAP",
        }.items()
    ),
    Metric(
        name="roc_auc",
        title="ROC AUC",
        definition=lambda answers, weights: roc_auc(_margin(answers), answers.labels == 1, weights),
        labels="binary",
        reads_scores=True,
        chance=lambda _: 0.5,
        extras=lambda answers: {"accuracy": float(((_margin(answers) > 0) == (answers.labels == 1)).mean())},
    ),
    Metric(
        name="macro_f1",
        title="macro F1",
        definition=lambda answers, weights: macro_f1(answers.predicted, answers.labels, weights),
        extras=answer_extras,
    ),
)
