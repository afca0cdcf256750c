"""Greedy answers are those of the published code, alone or in a batch, whatever the others in the batch do."""

from __future__ import annotations

from tiny import golden_prompt, table, tiny_model

from keye_train.evaluation.generate import generate_batch


def golden_tokens(name: str) -> list[int]:
    return table("greedy_with_cache.json")[name]["greedy"]


def names() -> list[str]:
    return list(table("greedy_with_cache.json"))


def test_each_prompt_alone() -> None:
    for name in names():
        expected = golden_tokens(name)
        assert generate_batch(tiny_model(), [golden_prompt(name)], len(expected), stop_ids=[499]) == [expected], name


def test_all_prompts_in_one_batch() -> None:
    """Text, images, videos and both, of different lengths, padded to one length."""
    limit = len(golden_tokens(names()[0]))
    answers = generate_batch(tiny_model(), [golden_prompt(name) for name in names()], limit, stop_ids=[499])
    assert dict(zip(names(), answers, strict=True)) == {name: golden_tokens(name) for name in names()}


def test_rows_that_stop_leave_the_others_as_they_were() -> None:
    """The second token of each answer in turn is the stop token: the batch shrinks at different steps."""
    for stopping in names():
        stop = golden_tokens(stopping)[1]
        answers = generate_batch(tiny_model(), [golden_prompt(name) for name in names()], 6, stop_ids=[stop])
        for name, answer in zip(names(), answers, strict=True):
            whole = golden_tokens(name)
            assert answer == (whole[: whole.index(stop)] if stop in whole else whole), (stopping, name)
