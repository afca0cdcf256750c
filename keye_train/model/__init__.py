"""What Keye is: configuration, positions, the parts, and the whole model. Needs torch and transformers only.

Names are loaded on first use: processes that only read data need neither the model nor transformers' model code.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keye_train.model.auto import register_auto_classes
    from keye_train.model.configuration import KeyeConfig, KeyeVisionConfig, keye_config
    from keye_train.model.contrastive import siglip_loss, siglip_loss_distributed
    from keye_train.model.dual_encoder import ContrastiveOutput, DualEncoder
    from keye_train.model.flops import FlopCoefficients, pack_flops
    from keye_train.model.generation import KeyeOutput
    from keye_train.model.image_processor import KeyeImageProcessor
    from keye_train.model.keye import KeyeForConditionalGeneration
    from keye_train.model.packed import IGNORE_INDEX, ContrastiveInputs, PackedInputs, VisionInputs
    from keye_train.model.parameters import compile_layers, enable_activation_checkpointing, module_parameters
    from keye_train.model.pretrained import load_dual_encoder, load_export, load_state, save_export
    from keye_train.model.processor import KeyeProcessor
    from keye_train.model.start import initial_dual_encoder, initial_model
    from keye_train.model.weight_files import read_state

_HOMES = {
    "auto": ("register_auto_classes",),
    "configuration": ("KeyeConfig", "KeyeVisionConfig", "keye_config"),
    "contrastive": ("siglip_loss", "siglip_loss_distributed"),
    "dual_encoder": ("ContrastiveOutput", "DualEncoder"),
    "flops": ("FlopCoefficients", "pack_flops"),
    "generation": ("KeyeOutput",),
    "image_processor": ("KeyeImageProcessor",),
    "keye": ("KeyeForConditionalGeneration",),
    "packed": ("IGNORE_INDEX", "ContrastiveInputs", "PackedInputs", "VisionInputs"),
    "parameters": ("compile_layers", "enable_activation_checkpointing", "module_parameters"),
    "pretrained": ("load_dual_encoder", "load_export", "load_state", "save_export"),
    "processor": ("KeyeProcessor",),
    "start": ("initial_dual_encoder", "initial_model"),
    "weight_files": ("read_state",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "IGNORE_INDEX",
    "ContrastiveInputs",
    "ContrastiveOutput",
    "DualEncoder",
    "FlopCoefficients",
    "KeyeConfig",
    "KeyeForConditionalGeneration",
    "KeyeImageProcessor",
    "KeyeOutput",
    "KeyeProcessor",
    "KeyeVisionConfig",
    "PackedInputs",
    "VisionInputs",
    "compile_layers",
    "enable_activation_checkpointing",
    "initial_dual_encoder",
    "initial_model",
    "keye_config",
    "load_dual_encoder",
    "load_export",
    "load_state",
    "module_parameters",
    "pack_flops",
    "read_state",
    "register_auto_classes",
    "save_export",
    "siglip_loss",
    "siglip_loss_distributed",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
