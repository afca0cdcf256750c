"""Keye under transformers' Auto classes, by our own code: nothing that a checkpoint brings along is run.

``import keye_train.model.auto`` is enough. From then on ``AutoConfig``, ``AutoProcessor``,
``AutoModelForImageTextToText`` and their kin read any folder or repository whose config.json has
``"model_type": "Keye"``. An ``auto_map`` in there, which names code of the repository, is passed over, with
``trust_remote_code`` as without: what is registered comes first.
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from keye_train.model.configuration import KeyeConfig
from keye_train.model.keye import KeyeForConditionalGeneration
from keye_train.model.processor import KeyeProcessor

# The published auto_map has the first two, transformers' pipelines ask for the others.
MODEL_CLASSES = (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)


def register_auto_classes() -> None:
    """Make Keye known to transformers' Auto classes; done on import, harmless again."""
    AutoConfig.register(KeyeConfig.model_type, KeyeConfig, exist_ok=True)
    for auto_class in MODEL_CLASSES:
        auto_class.register(KeyeConfig, KeyeForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(KeyeConfig, KeyeProcessor, exist_ok=True)


register_auto_classes()
