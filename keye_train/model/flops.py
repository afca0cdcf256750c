"""What a pack costs: multiply-adds of both towers' matrix products, counted as two operations each.

One formula serves the plan, the balance between ranks, the utilisation (MFU) and the forecast of a run. A sample of l
tokens costs ``linear * l + quadratic * l**2`` in the language model, an image or video of l patches likewise in the
tower (for the causal language model the quadratic part is l * (l + 1) / 2 pairs: kernels skip the upper triangle).
Norms, activations, rotary turns and embeddings are left out; they are below 1 % of the operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from keye_train.model.configuration import KeyeConfig

BACKWARD_FACTOR = 3  # forward, and two products of the same size in the backward, where all parameters train

Lengths = Sequence[int] | npt.NDArray[np.integer]


@dataclass(frozen=True)
class FlopCoefficients:
    """Operations of one forward."""

    language_token: float  # each token, in the layers
    language_pair: float  # each pair of a query and a key that it sees
    labelled_token: float  # each labelled token, in the output matrix
    vision_patch: float  # each patch, in the tower and, a quarter of a token's worth, in the projector
    vision_pair: float  # each pair of patches of one image or video

    @classmethod
    def of(cls, config: KeyeConfig) -> FlopCoefficients:
        """Coefficients of a model."""
        width, head_dim = config.hidden_size, config.attention_head_dim
        heads, groups = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        language = 2 * width * heads + 2 * width * groups + 3 * width * config.intermediate_size
        vision = config.vision
        inner = vision.hidden_size
        pixels = vision.num_channels * vision.patch_size**2
        tower = 4 * inner**2 + 2 * inner * vision.intermediate_size
        projector = ((4 * inner) ** 2 + 4 * inner * width) / 4
        return cls(
            language_token=2.0 * config.num_hidden_layers * language,
            language_pair=4.0 * config.num_hidden_layers * heads,
            labelled_token=2.0 * width * config.vocab_size,
            vision_patch=2.0 * (vision.num_hidden_layers * tower + pixels * inner + projector),
            vision_pair=4.0 * vision.num_hidden_layers * inner,
        )

    def language(self, sample_lengths: Lengths) -> npt.NDArray[np.float64]:
        """Cost of each sample in the language model's layers; lengths in tokens."""
        lengths = np.asarray(sample_lengths, dtype=np.float64)
        return self.language_token * lengths + self.language_pair * lengths * (lengths + 1) / 2

    def vision(self, vision_lengths: Lengths) -> npt.NDArray[np.float64]:
        """Cost of each image or whole video in tower and projector; lengths in patches."""
        lengths = np.asarray(vision_lengths, dtype=np.float64)
        return self.vision_patch * lengths + self.vision_pair * lengths**2


def pack_flops(config: KeyeConfig, sample_lengths: Lengths, vision_lengths: Lengths, labelled_tokens: int = 0) -> float:
    """Operations of the forward of one pack.

    Args:
        config: the model.
        sample_lengths: tokens of each sample.
        vision_lengths: patches of each image and each whole video.
        labelled_tokens: rows that go through the output matrix.
    """
    cost = FlopCoefficients.of(config)
    total = cost.language(sample_lengths).sum() + cost.vision(vision_lengths).sum()
    return float(total + cost.labelled_token * labelled_tokens)
