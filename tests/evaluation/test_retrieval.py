"""Recall on hand-worked similarities; equal captions are partners; towers that see no difference retrieve nothing."""

from __future__ import annotations

import pytest
import torch

from keye_train.evaluation.retrieval import retrieval_scores


def captions(*numbers: int) -> list[tuple[int, ...]]:
    return [(number,) for number in numbers]


def test_perfect_towers() -> None:
    vectors = torch.eye(8)
    scores = retrieval_scores(vectors, vectors, captions(*range(8)))
    for way in ("image_to_text", "text_to_image"):
        assert scores[way]["r1"]["score"] == 1.0
        assert scores[way]["r1"]["chance"] == pytest.approx(1 / 8)
        assert scores[way]["r5"]["chance"] == pytest.approx(5 / 8)


def test_one_image_prefers_another_text() -> None:
    images, texts = torch.eye(6), torch.eye(6)
    images[0] = torch.tensor([0.6, 0.8, 0, 0, 0, 0])
    scores = retrieval_scores(images, texts, captions(*range(6)))
    assert scores["image_to_text"]["r1"]["score"] == pytest.approx(5 / 6)
    assert scores["image_to_text"]["r5"]["score"] == 1.0
    assert scores["text_to_image"]["r1"]["score"] == 1.0  # text 0 still finds image 0 first


def test_equal_captions_are_partners() -> None:
    images = torch.eye(4)
    texts = torch.eye(4)[[0, 0, 2, 3]]  # images 0 and 1 share caption 7
    scores = retrieval_scores(images, texts, captions(7, 7, 8, 9))
    assert scores["n"] == 4
    assert scores["image_to_text"]["r1"]["chance"] == pytest.approx(1 / 3)
    assert scores["text_to_image"]["r1"]["chance"] == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)
    assert scores["text_to_image"]["r1"]["score"] == 1.0


def test_ties_count_against_the_model() -> None:
    vectors = torch.ones(8, 4) / 2
    scores = retrieval_scores(vectors, vectors, captions(*range(8)))
    assert scores["image_to_text"]["r5"]["score"] == 0.0


def test_fewer_candidates_than_the_recall_asks_for() -> None:
    scores = retrieval_scores(torch.eye(2), torch.eye(2), captions(1, 2))
    assert scores["image_to_text"]["r5"]["chance"] == 1.0
