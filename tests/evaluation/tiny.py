"""The tiny model of tests/golden and prompts for it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from keye_train.data.sample import SampleRef
from keye_train.model.configuration import KeyeConfig
from keye_train.model.keye import KeyeForConditionalGeneration
from keye_train.model.processing import EncodedSample

GOLDEN = Path(__file__).parents[1] / "golden"
PACKING_TABLE = "visual.vision_model.embeddings.packing_position_embedding.weight"  # left out of the file for size


@cache
def table(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


@cache
def tiny_model() -> KeyeForConditionalGeneration:
    """The tiny model, float32, in eval mode."""
    state = load_file(GOLDEN / "tiny_weights.safetensors")
    state[PACKING_TABLE] = torch.zeros(32768, state["mlp_AR.pre_norm.weight"].shape[0])
    model = KeyeForConditionalGeneration(KeyeConfig(**table("tiny_config.json")))
    model.load_state_dict(state, strict=True)
    return model.eval()


def golden_prompt(name: str) -> EncodedSample:
    """A sample of full_single.npz as the processor would give it."""
    with np.load(GOLDEN / "full_single.npz") as stored:
        fields = {key.split(".", 1)[1]: torch.from_numpy(stored[key]) for key in stored if key.startswith(f"{name}.")}
    kinds = ["video", "image"] if name == "video_then_image" else ["image", "video"]
    kinds = [kind for kind in kinds if f"{kind}_grid_thw" in fields]
    return EncodedSample(
        ref=SampleRef("golden", "full_single.npz", name),
        task=name,
        input_ids=fields["input_ids"],
        labels=fields["labels"],
        position_ids=fields["position_ids"],
        pixel_patches=torch.cat(
            [torch.zeros(0, 3, 14, 14, dtype=torch.uint8), *(fields[f"{kind}_pixels_u8"] for kind in kinds)]
        ),
        grid_thw=torch.cat([torch.zeros(0, 3, dtype=torch.int64), *(fields[f"{kind}_grid_thw"] for kind in kinds)]),
    )
