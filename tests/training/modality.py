"""``python modality.py OUT quick|rest``: every pair of kinds of packs, under every ZeRO stage and freeze pattern.

Rank 0 writes the gradient of each global batch as the engine has it, and the one that a plain process finds alone.
The learning rate is 0, so that every batch of every case is compared at the same weights.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement, product
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file
from torch import Tensor

from keye_train.model import (
    IGNORE_INDEX,
    ContrastiveInputs,
    DualEncoder,
    KeyeConfig,
    KeyeForConditionalGeneration,
    PackedInputs,
    VisionInputs,
    enable_activation_checkpointing,
    module_parameters,
    siglip_loss,
)
from keye_train.settings import CaptionDecoderSettings, Objective, Precision, TextTowerSettings

START, IMAGE, VIDEO = 60, 61, 62
TEXT = TextTowerSettings(64, 32, 48, 1, 2, max_tokens=6)
KINDS = ("text", "image", "video", "empty", "mixed")
PARTS = ("vision", "projector", "language")
LANGUAGE = tuple(trainable for size in (1, 2, 3) for trainable in combinations(PARTS, size))
CONTRASTIVE = (("vision",), ("text_tower",), ("vision", "text_tower"))
CAPTIONS = ((3, ("caption_decoder",)), *((stage, (*CONTRASTIVE[-1], "caption_decoder")) for stage in (1, 2, 3)))
DECODER = CaptionDecoderSettings(32, 48, 1, 2, 1, initializer_range=0.2)
CAPTION_WEIGHT = 2.0
# Global batches: micro-steps of what rank 0 and rank 1 hold. Every two kinds meet once, on changing sides.
MEETINGS = [pair[:: 1 - 2 * (number % 2)] for number, pair in enumerate(combinations_with_replacement(KINDS, 2))]
PACK_BATCHES = [MEETINGS[first::3] for first in range(3)]
PAIR_BATCHES = [list(product((0, 1, 3), repeat=2))]  # numbers of image-caption pairs


@dataclass(frozen=True)
class Case:
    """One engine."""

    objective: str  # language, contrastive, or captions: contrastive with a caption decoder
    zero_stage: int
    trainable: tuple[str, ...]
    checkpointing: str = "none"

    @property
    def name(self) -> str:
        ending = [] if self.checkpointing == "none" else [self.checkpointing]
        return "-".join([self.objective, f"zero{self.zero_stage}", *self.trainable, *ending])

    @property
    def batches(self) -> list[list[tuple[Any, Any]]]:
        return PACK_BATCHES if self.objective == "language" else PAIR_BATCHES


CASES = [
    *(Case("language", stage, trainable) for stage in (1, 2, 3) for trainable in LANGUAGE),
    *(Case("contrastive", stage, trainable) for stage in (1, 2, 3) for trainable in CONTRASTIVE),
    *(Case("captions", stage, trainable) for stage, trainable in CAPTIONS),
    Case("language", 3, LANGUAGE[-1], checkpointing="full"),
    Case("language", 3, LANGUAGE[-1], checkpointing="selective"),
]
QUICK = [
    case for case in CASES if case.zero_stage == 3 or case.trainable in (LANGUAGE[0], LANGUAGE[-1], CONTRASTIVE[-1])
]
"""Under ZeRO-3, where ranks meet in every module, each pattern; under 1 and 2 the extremes."""


def config() -> KeyeConfig:
    """A model of every part; weights large enough that no gradient drowns in rounding."""
    return KeyeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
        initializer_range=0.2,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 56,
        },
    )


def model_of(objective: str) -> KeyeForConditionalGeneration | DualEncoder:
    """The same weights each time, on every rank."""
    torch.manual_seed(0)
    if objective == "language":
        return KeyeForConditionalGeneration(config()).float().train()
    return DualEncoder(config(), TEXT, DECODER if objective == "captions" else None).float().train()


def vision(grids: list[list[int]], generator: torch.Generator) -> VisionInputs:
    """Random pixels."""
    grid = torch.tensor(grids, dtype=torch.int64).view(-1, 3)
    shape = (int(grid.prod(1).sum()), 3, 14, 14)
    return VisionInputs.build(torch.randint(256, shape, dtype=torch.uint8, generator=generator), grid)


def pack(kind: str) -> PackedInputs:
    """A pack of one kind."""
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    samples = {
        "text": [[], []],
        "image": [[(IMAGE, [1, 2, 4])], [(IMAGE, [1, 4, 4]), (IMAGE, [1, 2, 2])]],
        "video": [[(VIDEO, [3, 2, 4])]],
        "empty": [],
        "mixed": [[(VIDEO, [2, 2, 2]), (IMAGE, [1, 4, 2])], [], [(IMAGE, [1, 2, 2])]],
    }[kind]
    ids, labels, lengths = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)], []
    for media in samples:
        words = torch.randint(1, START, (9,), generator=generator)
        seen = [token for pad, (t, h, w) in media for token in (START, *[pad] * (t * h * w // 4))]
        sample = torch.cat([words[:3], torch.tensor(seen, dtype=torch.int64), words[3:]])
        ids.append(sample)
        labels.append(
            torch.full_like(sample, IGNORE_INDEX).index_copy(0, torch.arange(-4, 0) + len(sample), words[-4:])
        )
        lengths.append(len(sample))
    places = torch.cat([torch.zeros(0, dtype=torch.int64), *(torch.arange(length) for length in lengths)])
    pixels = vision([grid for media in samples for _, grid in media], generator)
    row = torch.cat(ids)
    return PackedInputs.build(row, torch.cat(labels), places.expand(3, -1), lengths, pixels, (IMAGE, VIDEO))


def pairs(rank: int, count: int, read: bool) -> ContrastiveInputs:
    """Image-caption pairs of a rank; ``read``: with captions for the decoder, of 2, 3, ... words."""
    generator = torch.Generator().manual_seed(10 * rank + count)
    pixels = vision([[1, 2, 2 + 2 * number] for number in range(count)], generator)
    text_ids = torch.randint(64, (count, TEXT.max_tokens), generator=generator)
    if not (read and count):
        return ContrastiveInputs(pixels, text_ids)
    words = [torch.randint(1, START, (2 + number,), generator=generator) for number in range(count)]
    rows = [torch.cat([torch.full((1 + number,), IMAGE), said]) for number, said in enumerate(words)]
    labels = [row.where(row != IMAGE, IGNORE_INDEX) for row in rows]
    places = torch.cat([torch.arange(len(row)) for row in rows]).expand(3, -1)
    lengths = [len(row) for row in rows]
    captions = PackedInputs.build(torch.cat(rows), torch.cat(labels), places, lengths, pixels, (IMAGE, VIDEO))
    return ContrastiveInputs(pixels, text_ids, captions)


def inputs_of(objective: str, batch: list[tuple[Any, Any]], rank: int) -> list[Any]:
    """What a rank reads in one global batch."""
    read = objective == "captions"
    return [pack(held[rank]) if objective == "language" else pairs(rank, held[rank], read) for held in batch]


def items(inputs: PackedInputs | ContrastiveInputs) -> int:
    """Labelled tokens, or pairs."""
    return len(inputs.loss_rows) if isinstance(inputs, PackedInputs) else len(inputs.text_ids)


def plain_gradients(objective: str) -> list[dict[str, Tensor]]:
    """One gradient for each global batch: one process, no engine, all parameters; Stage 0 scores all pairs at once."""
    found = []
    for batch in PACK_BATCHES if objective == "language" else PAIR_BATCHES:
        model = model_of(objective)
        held = [inputs_of(objective, batch, rank) for rank in (0, 1)]
        total = sum(items(one) for rank in held for one in rank)
        for both in zip(*held, strict=True):
            if isinstance(model, DualEncoder):
                outputs = [model(one) for one in both if items(one)]
                if not outputs:
                    continue
                images, texts = (torch.cat([output[part] for output in outputs]) for part in (0, 1))
                losses = siglip_loss(images, texts, outputs[0].logit_scale, outputs[0].logit_bias)
                if objective == "captions":
                    losses = losses + CAPTION_WEIGHT * torch.cat([output.caption_losses for output in outputs])
                (losses.sum() / total).backward()
            else:
                for one in both:
                    if items(one):
                        (model.forward_packed(one).sum() / total).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return found


def main(out: Path, part: str) -> None:
    """Run the cases of QUICK, or the others; see the module."""
    from toy import settings

    from keye_train.training import distributed
    from keye_train.training.build import freeze
    from keye_train.training.engine import Engine
    from keye_train.training.learner import weighted_sum
    from keye_train.training.objectives import ContrastiveObjective, LanguageObjective
    from keye_train.training.optimizer import parameter_groups

    world = distributed.start(timeout_minutes=5)
    for case in CASES:
        if (case in QUICK) != (part == "quick"):
            continue
        recipe = settings(case.zero_stage, "fp32", False)
        recipe.deepspeed.param_persistence_threshold = 500  # matrices are partitioned, the many vectors stay whole
        recipe.stage.objective = Objective.language if case.objective == "language" else Objective.contrastive
        recipe.stage.trainable = list(case.trainable)
        recipe.stage.optimizer.lr, recipe.stage.optimizer.module_lr.vision = 0.0, None
        model = model_of(case.objective)
        freeze(model, recipe.stage)
        if case.checkpointing != "none":
            enable_activation_checkpointing(model, case.checkpointing == "selective")
        objective = (
            LanguageObjective(model, Precision.fp32)
            if isinstance(model, KeyeForConditionalGeneration)
            else ContrastiveObjective(model, Precision.fp32, CAPTION_WEIGHT if case.objective == "captions" else 0.0)
        )
        groups = parameter_groups(module_parameters(model), recipe.stage)
        engine = Engine(objective, model, groups, recipe, world)
        gradients: dict[str, Tensor] = {}
        for number, batch in enumerate(case.batches):
            mine = inputs_of(case.objective, batch, world.rank)
            total = world.sum_int([sum(items(one) for one in mine)])[0]
            for place, one in enumerate(mine):
                losses, _ = engine.forward(one)
                engine.accumulate(weighted_sum(losses, world.size / total), last=place == len(mine) - 1)
            for name, parameter in engine.trainable.items():
                gradient = safe_get_full_grad(parameter)  # Collective: every rank must reach this.
                assert gradient is not None, f"{case.name}: {name} has no gradient"
                gradients[f"{number}/{name}"] = gradient.clone().view(engine.shapes[name])
            assert engine.apply().applied
        engine.close()
        if world.is_main:
            save_file(gradients, out / f"{case.name}.safetensors")
    if world.is_main:
        for kind in ("language", "contrastive", "captions"):
            plain = plain_gradients(kind)
            named = {f"{number}/{name}": grad for number, grads in enumerate(plain) for name, grad in grads.items()}
            save_file({name: grad.contiguous() for name, grad in named.items()}, out / f"plain-{kind}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
