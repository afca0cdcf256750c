"""Questions as tensors, and what a model answers to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from keye_train.data.heldout import Skipped, leave_out
from keye_train.evaluation.generate import generate_batch
from keye_train.evaluation.heldout import Heldout, Question
from keye_train.model.keye import KeyeForConditionalGeneration
from keye_train.model.sample_encoder import EncodedSample, SampleEncoder
from keye_train.sample import SampleError
from keye_train.settings import SettingsError


@dataclass(frozen=True)
class Encoded:
    """A question as tensors."""

    question: Question
    prompt: EncodedSample
    whole: EncodedSample  # with the answer, for the loss


def encode_task(heldout: Heldout, processor: SampleEncoder, quiet: bool | None) -> tuple[list[Encoded], list[Skipped]]:
    """The samples of a task as tensors, and those that cannot be asked with the reason.

    Args:
        quiet: True: no progress bar; None: none where stderr is no terminal.

    Raises:
        SettingsError: none of them can be decoded.
    """
    encoded, skipped = [], list(heldout.skipped)
    for question in tqdm(heldout.questions, desc=f"read {heldout.task}", disable=quiet, leave=False):
        sample = question.sample
        try:
            encoded.append(Encoded(question, processor.encode_prompt(sample), processor.encode(sample)))
        except SampleError as error:
            skipped.append(leave_out(heldout.task, sample.ref, error))
    if not encoded:
        raise SettingsError(
            f"data.heldout.{heldout.task}: none of its samples can be decoded; run keye-data check on its shards"
        )
    return encoded, skipped


def answer_all(
    model: KeyeForConditionalGeneration,
    encoded: Sequence[Encoded],
    processor: SampleEncoder,
    batch_size: int,
    max_new_tokens: int,
    done: Callable[[int], object] = lambda count: None,
) -> list[str]:
    """The model's answer to each question, greedy.

    Args:
        done: told how many more have been answered.
    """
    ids = processor.model.special_tokens
    answers: list[str] = [""] * len(encoded)
    # Batches of prompts of about one length waste little on padding.
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].prompt.input_ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        new = generate_batch(model, [encoded[i].prompt for i in chosen], max_new_tokens, [ids.eos, ids.bos])
        for i, tokens in zip(chosen, new, strict=True):
            answers[i] = str(processor.tokenizer.decode(tokens, skip_special_tokens=False)).strip()
        done(len(chosen))
    return answers
