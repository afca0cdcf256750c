"""What Keye is: configuration, positions, the parts, and the whole model. Needs torch and transformers only."""

from keye_train.model.configuration import KeyeConfig, KeyeVisionConfig, keye_config
from keye_train.model.generation import KeyeOutput
from keye_train.model.keye import KeyeForConditionalGeneration
from keye_train.model.packed import IGNORE_INDEX, ContrastiveInputs, PackedInputs, VisionInputs
from keye_train.model.parameters import enable_activation_checkpointing, module_parameters

__all__ = [
    "IGNORE_INDEX",
    "ContrastiveInputs",
    "KeyeConfig",
    "KeyeForConditionalGeneration",
    "KeyeOutput",
    "KeyeVisionConfig",
    "PackedInputs",
    "VisionInputs",
    "enable_activation_checkpointing",
    "keye_config",
    "module_parameters",
]
