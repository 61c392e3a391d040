"""Accuracy: counted right, over every image once, and nothing touched."""

from __future__ import annotations

import json

import pytest
import torch
from small_nets import Small
from torch import nn

from nasdet.detectors.classifier import Classifier
from nasdet.engine.classify import _places, evaluate_classifier


class Oracle(nn.Module):
    """Answers with the image's right class in the place asked for, by the order in which images come."""

    def __init__(self, labels, place):
        super().__init__()
        self.labels, self.place, self.seen = labels, place, 0

    def forward(self, images):
        rows = torch.zeros(len(images), 10)
        for row in rows:
            others = [label for label in range(10) if label != self.labels[self.seen]]
            others.insert(self.place, self.labels[self.seen])
            row[torch.tensor(others)] = torch.arange(10, 0, -1).float()
            self.seen += 1
        return rows


@pytest.mark.parametrize(("place", "top1", "top5"), [(0, 1.0, 1.0), (1, 0.0, 1.0), (4, 0.0, 1.0), (5, 0.0, 0.0)])
@pytest.mark.parametrize("batch", [3, 64])
def test_places_are_counted_over_every_image_once(digit_classes, place, top1, top5, batch):
    dataset = digit_classes.test()
    model = Oracle([picture.label for picture in dataset.pictures], place)
    found = evaluate_classifier(model, dataset, size=24, batch=batch, progress=False)
    assert (found["images"], found["top1"], found["top5"]) == (20, top1, top5) and model.seen == 20


def test_of_equal_logits_the_smaller_class_comes_first():
    assert _places(torch.zeros(3, 4), torch.tensor([0, 2, 3]), 4) == [0, 2, 3]
    assert _places(torch.tensor([[1.0, 2.0, 2.0]]), torch.tensor([2]), 3) == [1]


def test_the_model_and_its_statistics_stay(digit_classes, tmp_path):
    model = Classifier(Small(), 32, 10).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = evaluate_classifier(model, digit_classes.search_val(), size=24, progress=False, out=tmp_path, step=3)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert json.loads((tmp_path / "eval-search-val.json").read_text()) == found
    assert (found["split"], found["step"]) == ("search-val", 3)


class Constant(nn.Module):
    def __init__(self, row):
        super().__init__()
        self.row = row

    def forward(self, images):
        return torch.tensor([self.row] * len(images))


@pytest.mark.parametrize(
    ("row", "message"),
    [([1.0] * 9, r"logits must have shape \(20, 10\), got \(20, 9\)"), ([float("nan")] * 10, "must be finite")],
    ids=["classes", "nan"],
)
def test_a_model_that_cannot_be_scored(digit_classes, row, message):
    with pytest.raises(ValueError, match=message):
        evaluate_classifier(Constant(row), digit_classes.test(), size=24, progress=False)


def test_no_image_is_an_error(digit_classes):
    with pytest.raises(ValueError, match="at least one image to be scored on"):
        evaluate_classifier(Constant([0.0] * 10), digit_classes.test().subset([]), progress=False)


@pytest.mark.parametrize("last", [None, 6])
def test_the_classifier_averages_the_last_map(last):
    model = Classifier(Small(), 32, 10, last, label_smoothing=0.1).eval()
    images, targets = torch.randn(4, 3, 16, 24), [{"label": label} for label in (0, 3, 9, 3)]
    features = model.last(model.backbone(images)["c4"])
    logits = model(images)
    torch.testing.assert_close(logits, features.mean((2, 3)) @ model.fc.weight.T + model.fc.bias)
    log = logits.log_softmax(1)
    wanted = -(0.9 * log[range(4), [0, 3, 9, 3]] + 0.1 * log.mean(1)).mean()
    torch.testing.assert_close(model.loss(logits, targets)["loss_cls"], wanted)
    assert (last is None) == isinstance(model.last, nn.Identity)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 10), "channels"), ((8, 0), "classes"), ((8, 10, 0), "last"), ((8, True), "classes")],
    ids=str,
)
def test_bad_classifiers(arguments, message):
    with pytest.raises(ValueError, match=f"{message} must be a positive integer"):
        Classifier(Small(), *arguments)
