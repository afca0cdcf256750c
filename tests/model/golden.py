"""The recorded numbers of the published code, and the tiny model that they belong to."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from keye_train.model import KeyeConfig, KeyeForConditionalGeneration, PackedInputs, VisionInputs

GOLDEN = Path(__file__).parents[1] / "golden"
PACKING_TABLE = "visual.vision_model.embeddings.packing_position_embedding.weight"  # left out of the file for size
SAMPLES = ("text", "image", "two_images", "video", "image_and_video", "video_then_image")


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name) as stored:
        return dict(stored)


@cache
def table(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def tensor(file: str, key: str) -> Tensor:
    return torch.from_numpy(arrays(file)[key].copy())


@cache
def tiny_state() -> dict[str, Tensor]:
    state = load_file(GOLDEN / "tiny_weights.safetensors")
    state[PACKING_TABLE] = torch.zeros(32768, state["mlp_AR.pre_norm.weight"].shape[0])
    return state


def tiny_model() -> KeyeForConditionalGeneration:
    """A fresh copy of the tiny model, float32, in training mode (it has no dropout)."""
    model = KeyeForConditionalGeneration(KeyeConfig(**table("tiny_config.json")))
    model.load_state_dict(tiny_state(), strict=True)
    return model.train()


def floats(levels: Tensor) -> Tensor:
    """Normalised pixels as the published image processor gives them."""
    return ((levels.double() * (1 / 255)).float() - 0.5) / 0.5


def call_arguments(sample: str) -> dict[str, Tensor]:
    """Arguments of the published ``forward`` for one sample of full_single.npz."""
    stored = {key.split(".", 1)[1]: key for key in arrays("full_single.npz") if key.startswith(f"{sample}.")}
    arguments = {"input_ids": tensor("full_single.npz", stored["input_ids"])[None]}
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if f"{kind}_grid_thw" in stored:
            arguments[pixels] = floats(tensor("full_single.npz", stored[f"{kind}_pixels_u8"]))
            arguments[f"{kind}_grid_thw"] = tensor("full_single.npz", stored[f"{kind}_grid_thw"])
    if "second_per_grid_ts" in stored:
        arguments["second_per_grid_ts"] = tensor("full_single.npz", stored["second_per_grid_ts"])
    return arguments


def pack(samples: tuple[str, ...], config: KeyeConfig) -> PackedInputs:
    """Samples of full_single.npz in one row, with uint8 patches."""

    def field(sample: str, name: str) -> Tensor:
        return tensor("full_single.npz", f"{sample}.{name}")

    patches, grids = [torch.zeros(0, 3, 14, 14, dtype=torch.uint8)], [torch.zeros(0, 3, dtype=torch.int64)]
    for sample in samples:
        kinds = ["video", "image"] if sample == "video_then_image" else ["image", "video"]
        for kind in kinds:
            if f"{sample}.{kind}_grid_thw" in arrays("full_single.npz"):
                patches.append(field(sample, f"{kind}_pixels_u8"))
                grids.append(field(sample, f"{kind}_grid_thw"))
    return PackedInputs.build(
        torch.cat([field(sample, "input_ids") for sample in samples]),
        torch.cat([field(sample, "labels") for sample in samples]),
        torch.cat([field(sample, "position_ids") for sample in samples], dim=1),
        [len(field(sample, "input_ids")) for sample in samples],
        VisionInputs.build(torch.cat(patches), torch.cat(grids)),
        (config.image_token_id, config.video_token_id),
    )


def assert_gradient_norms(model: torch.nn.Module, expected: dict[str, float | None]) -> None:
    """Gradient norms within the published tolerance; null means that no loss reaches the parameter."""
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(expected)
    for name, norm in expected.items():
        gradient = parameters[name].grad
        measured = 0.0 if gradient is None else gradient.double().norm().item()
        assert abs(measured - (norm or 0.0)) <= max(5e-5 * (norm or 0.0), 1e-7), name
