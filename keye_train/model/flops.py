"""What a pack costs: multiply-adds of both towers' matrix products, counted as two operations each.

One formula serves the plan, the balance between ranks, the utilisation (MFU) and the forecast of a run. Terms, with the
symbols of the configuration (docs/model.md derives them):

===============  =========================================================  ==========================================
counted for      operations of a forward                                    how often in a pack
===============  =========================================================  ==========================================
language_token   2 L (2 W A + 2 W G + 3 W F), A and G the summed widths of  once a token
                 query and key heads
language_pair    4 L A                                                      n (n + 1) / 2 for a sample of n tokens
labelled_token   2 W V                                                      once a labelled token
pixel_patch      2 * 588 C                                                  once a patch
tower_patch      2 L' (4 C^2 + 2 C F')                                      once a patch
projector_patch  2 ((4 C)^2 + 4 C W) / 4                                    once a patch
vision_pair      4 L' C                                                     n^2 for an image or video of n patches
===============  =========================================================  ==========================================

Attention is counted for each segment: samples of a pack do not see each other, and of the language model's products
only the causal half is counted, the diagonal included, because the fused kernels skip the rest. Norms, activations,
rotary turns and embeddings are left out; they are below 1 % of the operations of the published model.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from keye_train.model.configuration import KeyeConfig

TOWERS = ("vision", "projector", "language")

Lengths = Sequence[int] | npt.NDArray[np.integer]


@dataclass(frozen=True)
class FlopCoefficients:
    """Operations for each token, patch and pair; see the table above."""

    language_token: float  # each token, in the layers
    language_pair: float  # each pair of a query and a key that it sees
    labelled_token: float  # each labelled token, in the output matrix
    pixel_patch: float  # each patch, in the patch embedding
    tower_patch: float  # each patch, in the tower's layers
    projector_patch: float  # each patch: a quarter of a token's worth
    vision_pair: float  # each pair of patches of one image or video

    @classmethod
    def of(cls, config: KeyeConfig) -> FlopCoefficients:
        """Coefficients of a forward."""
        width, head_dim = config.hidden_size, config.attention_head_dim
        heads, groups = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        layer = 2 * width * heads + 2 * width * groups + 3 * width * config.intermediate_size
        vision = config.vision
        inner = vision.hidden_size
        pixels = vision.num_channels * vision.patch_size**2
        tower_patch, vision_pair = tower_flops(vision.num_hidden_layers, inner, vision.intermediate_size)
        return cls(
            language_token=2.0 * config.num_hidden_layers * layer,
            language_pair=4.0 * config.num_hidden_layers * heads,
            labelled_token=2.0 * width * config.vocab_size,
            pixel_patch=2.0 * pixels * inner,
            tower_patch=tower_patch,
            projector_patch=2.0 * ((4 * inner) ** 2 + 4 * inner * width) / 4,
            vision_pair=vision_pair,
        )

    def for_training(self, trainable: Collection[str] = TOWERS) -> FlopCoefficients:
        """Coefficients of a forward and the backward that it needs, from coefficients of a forward.

        A product of states with a weight has two of its size in the backward: one for the gradient of its input, where
        something that learns lies before it, and one for that of the weight, where the weight learns. A product of two
        states (attention) has both or none. What a device computes twice (recomputed activations, logits formed again,
        the fused attention backward) counts once: utilisation is about what the step needs.

        Args:
            trainable: which of vision, projector and language learn.
        """
        vision, projector, language = (name in trainable for name in TOWERS)
        anything, below_language = vision or projector or language, vision or projector
        return FlopCoefficients(
            language_token=self.language_token * (1 + anything + language),
            language_pair=self.language_pair * (1 + 2 * anything),
            labelled_token=self.labelled_token * (1 + anything + language),
            pixel_patch=self.pixel_patch * (1 + vision),  # pixels need no gradient
            tower_patch=self.tower_patch * (1 + 2 * vision),
            projector_patch=self.projector_patch * (1 + below_language + projector),
            vision_pair=self.vision_pair * (1 + 2 * vision),
        )

    @property
    def vision_patch(self) -> float:
        """Each patch, in tower and projector."""
        return self.pixel_patch + self.tower_patch + self.projector_patch

    def language(self, sample_lengths: Lengths) -> npt.NDArray[np.float64]:
        """Cost of each sample in the language model's layers; lengths in tokens."""
        lengths = np.asarray(sample_lengths, dtype=np.float64)
        return self.language_token * lengths + self.language_pair * lengths * (lengths + 1) / 2

    def vision(self, vision_lengths: Lengths) -> npt.NDArray[np.float64]:
        """Cost of each image or whole video in tower and projector; lengths in patches."""
        lengths = np.asarray(vision_lengths, dtype=np.float64)
        return self.vision_patch * lengths + self.vision_pair * lengths**2

    def pack(self, sample_lengths: Lengths, vision_lengths: Lengths, labelled_tokens: int = 0) -> float:
        """Cost of one pack.

        Args:
            sample_lengths: tokens of each sample.
            vision_lengths: patches of each image and each whole video.
            labelled_tokens: rows that go through the output matrix.
        """
        towers = self.language(sample_lengths).sum() + self.vision(vision_lengths).sum()
        return float(towers + self.labelled_token * labelled_tokens)


def tower_flops(layers: int, width: int, inner_width: int) -> tuple[float, float]:
    """Operations of a forward of the layers of a SigLIP tower: for each position, and for each pair of them."""
    return 2.0 * layers * (4 * width**2 + 2 * width * inner_width), 4.0 * layers * width


def pack_flops(config: KeyeConfig, sample_lengths: Lengths, vision_lengths: Lengths, labelled_tokens: int = 0) -> float:
    """Operations of the forward of one pack; see :meth:`FlopCoefficients.pack`."""
    return FlopCoefficients.of(config).pack(sample_lengths, vision_lengths, labelled_tokens)
