"""What a pack costs in a training step: operations of forward and backward, from four sums over its samples."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keye_train.data.corpus import Sizes
from keye_train.model.configuration import KeyeConfig, keye_config
from keye_train.model.flops import FlopCoefficients, tower_flops
from keye_train.settings import Objective, TrainSettings


@dataclass(frozen=True)
class PackCost:
    """Cost of packs, linear in what they hold. Any unit serves, since packs are only compared."""

    token: float  # each language token
    token_squared: float  # each sample's tokens squared
    patch: float  # each vision patch
    patch_squared: float  # each image's or video's patches squared

    def __call__(self, sizes: Sizes) -> np.ndarray:
        """[N] float64. Term by term, in one order, so that every machine gets the same."""
        cost = self.token * sizes.tokens
        cost = cost + self.token_squared * sizes.tokens_squared
        cost = cost + self.patch * sizes.patches
        return cost + self.patch_squared * sizes.patches_squared


def language_cost(flops: FlopCoefficients) -> PackCost:
    """Cost with the language objective. Which tokens are labelled the index does not say, so the output matrix, below a
    tenth of a text token's cost in the published model, is left out.
    """
    half_pair = flops.language_pair / 2  # a causal model sees n (n + 1) / 2 pairs of a sample of n tokens
    return PackCost(flops.language_token + half_pair, half_pair, flops.vision_patch, flops.vision_pair)


def read_cost(path: str | Path, config: PackCost) -> PackCost:
    """The cost in a file of ``keye-data fit-cost``.

    Args:
        path: of the file.
        config: cost by the config of the run that asks, which must be that of the run that was measured.

    Raises:
        ValueError: it cannot be read, is no such file, or was fitted on another model or stage.
    """
    try:
        held: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        cost, fitted_on = (
            PackCost(**{name: float(value) for name, value in held[key].items()}) for key in ("cost", "config")
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"data.cost_file={path} has no cost of packs ({error}): make it with keye-data fit-cost"
        ) from error
    values = list(asdict(cost).values())
    if not all(np.isfinite(value) and value >= 0 for value in values) or not any(values):
        raise ValueError(f"data.cost_file={path}: coefficients are finite, at least 0, and not all 0")
    if not np.allclose(list(asdict(fitted_on).values()), list(asdict(config).values()), rtol=1e-6):
        raise ValueError(
            f"data.cost_file={path} was fitted on a run of another model, or of a stage that trains other parts: run "
            "keye-data fit-cost on a run of this one, or set data.cost_file=null"
        )
    return cost


def training_cost(settings: TrainSettings) -> PackCost:
    """Cost of a pack in a step of this run: of ``data.cost_file``, or by what the stage trains.

    Raises:
        ValueError: the file cannot be used.
    """
    config = config_cost(settings)
    return read_cost(settings.data.cost_file, config) if settings.data.cost_file else config


def config_cost(settings: TrainSettings) -> PackCost:
    """Operations of a pack in a step of this run, by what the stage trains.

    With the contrastive objective every sample takes ``text_tower.max_tokens`` = m tokens: the text tower runs over all
    of them, padding included. A caption decoder sees n = p / 4 + m tokens of an image of p patches; captions count at
    their longest, since the index counts the tokens of another tokenizer.
    """
    model, stage = settings.model, settings.stage
    config = keye_config(model)
    if stage.objective == Objective.language:
        return language_cost(FlopCoefficients.of(config).for_training(stage.trainable))
    m = model.text_tower.max_tokens
    vision = FlopCoefficients.of(config).for_training(stage.trainable)
    text = model.text_tower
    times = 3 if "text_tower" in stage.trainable else 1
    per_token, per_pair = tower_flops(text.num_hidden_layers, text.hidden_size, text.intermediate_size)
    token = times * (per_token + per_pair * m)  # a sample's pairs are m^2: m for each of its tokens
    patch, patch_squared = vision.pixel_patch + vision.tower_patch, vision.vision_pair
    if stage.caption_weight > 0:
        shape = asdict(model.caption_decoder)
        head_dim = shape["hidden_size"] // shape["num_attention_heads"]
        own = KeyeConfig(**shape, vocab_size=text.vocab_size, head_dim=head_dim, vision_config=config.vision)
        learns = {"vision"} & set(stage.trainable)
        if "caption_decoder" in stage.trainable:
            learns |= {"projector", "language"}
        decoder = FlopCoefficients.of(own).for_training(learns)
        # n (n + 1) / 2 = p^2 / 32 + p (2 m + 1) / 8 + m (m + 1) / 2
        token += decoder.language_token + decoder.labelled_token + decoder.language_pair * (m + 1) / 2
        patch += decoder.projector_patch + decoder.language_token / 4 + decoder.language_pair * (2 * m + 1) / 8
        patch_squared += decoder.language_pair / 32
    return PackCost(token, 0.0, patch, patch_squared)
