"""Scores are right on hand-worked cases, chance is that of the best constant answer, garbage never raises."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keye_train.evaluation.scoring import (
    Metric,
    Target,
    chance_level,
    edit_similarity,
    interval,
    iou,
    mean_interval,
    normalise,
    score,
    token_f1,
)
from keye_train.model.markup import format_boxes, parse_boxes, parse_points
from keye_train.sample import Sample, SampleError, SampleRef


def box(*corners: float) -> str:
    return format_boxes([corners])


def boxed(*corners: float) -> Target:
    return Target(Metric.box_iou, box(*corners))


def pointed(*corners: float) -> Target:
    return Target(Metric.point, "<|point_start|>[[0,0]]<|point_end|>", corners)  # type: ignore[arg-type]


def texts(metric: Metric, *answers: str) -> list[Target]:
    return [Target(metric, answer) for answer in answers]


class TestScores:
    @pytest.mark.parametrize(
        ("generated", "right"),
        [("red circle", 1), (" Red  Circle. ", 1), ("“red circle”", 0), ("red", 0), ("", 0), ("RED\nCIRCLE", 1)],
    )
    def test_exact(self, generated: str, right: int) -> None:
        assert score(Target(Metric.exact, "red circle"), generated) == right

    def test_normalise_keeps_what_tells_answers_apart(self) -> None:
        assert normalise("1.5") == "1.5"
        assert normalise("３ 只猫。") == "3 只猫"  # full-width digits are digits
        assert normalise("don't") == "don't"

    @pytest.mark.parametrize(
        ("generated", "right"),
        [
            (box(0, 0, 100, 100), 1),
            (box(0, 0, 100, 50), 1),  # IoU exactly 0.5
            (box(0, 0, 100, 49), 0),
            (box(100, 100, 0, 0), 0),  # corners in the wrong order have no area
            ("<|box_start|>[[0, 0, 100, 100]]", 1),  # cut off by the limit of new tokens
            ("here: <|box_start|> [[ 0,0 , 100.0,100 ]] <|box_end|>", 1),
            ("[[0,0,100,100]]", 0),  # outside the box tokens
            (format_boxes([(0, 0, 100, 100), (5, 5, 9, 9)]), 0),
        ],
    )
    def test_box(self, generated: str, right: int) -> None:
        assert score(boxed(0, 0, 100, 100), generated) == right

    def test_several_boxes_match_one_to_one(self) -> None:
        target = Target(Metric.box_iou, format_boxes([(0, 0, 10, 10), (50, 50, 60, 60)]))
        assert score(target, format_boxes([(50, 50, 60, 60), (0, 0, 10, 10)])) == 1
        assert score(target, format_boxes([(0, 0, 10, 10), (0, 0, 10, 10)])) == 0

    @pytest.mark.parametrize(
        ("generated", "right"),
        [
            ("<|point_start|>[[15,20]]<|point_end|>", 1),
            ("<|point_start|>[[21,20]]<|point_end|>", 0),
            ("<|point_start|>[[15,20],[15,20]]<|point_end|>", 0),
            ("15,20", 0),
        ],
    )
    def test_point(self, generated: str, right: int) -> None:
        assert score(pointed(10, 10, 20, 30), generated) == right

    def test_iou(self) -> None:
        assert iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
        assert iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0

    def test_token_f1(self) -> None:
        assert token_f1("a cat on a mat", "the cat on the mat") == pytest.approx(2 * 3 / 10)
        assert token_f1("红色的圆", "红色圆") == pytest.approx(2 * 3 / 7)
        assert token_f1("", "cat") == 0

    def test_edit(self) -> None:
        assert edit_similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
        assert edit_similarity("Kitten.", "kitten") == 1
        assert edit_similarity("", "abc") == 0

    @given(st.text(), st.sampled_from([boxed(1, 1, 5, 5), pointed(1, 1, 5, 5), *texts(Metric.edit, "a")]))
    def test_garbage_never_raises(self, text: str, target: Target) -> None:
        for generated in (text, f"<|box_start|>{text}", f"<|point_start|>[[{text}]]<|point_end|>"):
            assert 0 <= score(target, generated) <= 1

    @given(st.lists(st.tuples(*[st.integers(0, 499)] * 2, *[st.integers(500, 999)] * 2), min_size=1, max_size=4))
    def test_boxes_survive_writing_and_reading(self, boxes: list[tuple[int, int, int, int]]) -> None:
        assert parse_boxes(format_boxes(boxes)) == [tuple(map(float, b)) for b in boxes]

    def test_points_need_two_numbers(self) -> None:
        assert parse_points("<|point_start|>[[1,2,3]]<|point_end|>") == []


class TestChance:
    def test_exact_is_the_share_of_the_commonest_answer(self) -> None:
        assert chance_level(texts(Metric.exact, "red", "Red.", "blue", "green")) == 0.5

    def test_box_may_be_the_mean(self) -> None:
        """No two targets meet with IoU 0.5, but their mean meets both: 60 / 100 of its area each."""
        left, right = boxed(0, 0, 600, 100), boxed(399, 0, 999, 100)
        assert iou(parse_boxes(left.answer)[0], parse_boxes(right.answer)[0]) < 0.5
        mean = (200.0, 0.0, 800.0, 100.0)
        assert iou(mean, (0, 0, 600, 100)) == pytest.approx(0.5)
        assert chance_level([left, right]) == 1.0

    def test_box_may_be_one_of_the_targets(self) -> None:
        assert chance_level([boxed(0, 0, 10, 10), boxed(0, 0, 10, 10), boxed(500, 500, 990, 990)]) == pytest.approx(
            2 / 3
        )

    def test_point_is_where_most_boxes_overlap(self) -> None:
        targets = [pointed(0, 0, 10, 10), pointed(10, 10, 20, 20), pointed(5, 5, 6, 6), pointed(900, 900, 999, 999)]
        assert chance_level(targets) == 0.5  # (10, 10) lies in two, (5, 5) as well
        assert chance_level([pointed(900, 900, 999, 999)]) == 1.0

    def test_edit_and_f1_try_every_answer(self) -> None:
        assert chance_level(texts(Metric.edit, "aa", "ab", "zz")) == pytest.approx((1 + 0.5 + 0) / 3)
        assert chance_level(texts(Metric.token_f1, "a b", "a c", "x")) == pytest.approx((1 + 0.5 + 0) / 3)

    def test_mixed_metrics_get_one_constant_each(self) -> None:
        targets = [*texts(Metric.exact, "a", "b"), *texts(Metric.edit, "zz", "zz")]
        assert chance_level(targets) == pytest.approx((1 + 2) / 4)


class TestIntervals:
    def test_wilson(self) -> None:
        """Published example: 81 of 263 gives [0.2553, 0.3662] (Newcombe 1998, method 3)."""
        low, high = interval([1.0] * 81 + [0.0] * 182)
        assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
        low, high = interval([1.0] * 20)
        assert high == 1.0
        assert 0.8 < low < 0.9

    def test_bootstrap_is_deterministic_and_holds_the_mean(self) -> None:
        scores = [i / 20 for i in range(21)]
        low, high = interval(scores)
        assert (low, high) == interval(scores)
        assert low < 0.5 < high
        assert high - low == pytest.approx(2 * 1.96 * 0.3028 / math.sqrt(21), rel=0.1)

    def test_mean_over_tasks(self) -> None:
        low, high = mean_interval([[1.0, 0.0] * 50, [1.0] * 10])
        assert (low + high) / 2 == pytest.approx(0.75)
        assert high - low == pytest.approx(2 * 1.96 * 0.05 / 2, rel=1e-3)


class TestTargets:
    def sample(self, **meta: Any) -> Sample:
        return Sample(SampleRef("heldout", "x.tar", "1"), [], meta=meta)

    def test_read_from_the_sample(self) -> None:
        target = Target.of(self.sample(answer="<|point_start|>..", metric="point", box=[1, 2, 3, 4]))
        assert target.box == (1.0, 2.0, 3.0, 4.0)

    @pytest.mark.parametrize(
        ("meta", "message"),
        [
            ({}, "'answer' is missing"),
            ({"answer": "a", "metric": "bleu"}, "'metric' is 'bleu'"),
            ({"answer": "a", "metric": "point"}, "'box' is missing"),
            ({"answer": "a", "metric": "box_iou"}, "holds no box"),
        ],
    )
    def test_incomplete_samples_are_named(self, meta: dict[str, Any], message: str) -> None:
        with pytest.raises(SampleError, match=message):
            Target.of(self.sample(**meta))
