"""Small exports to merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor

CONFIG = {
    "model_type": "Keye",
    "torch_dtype": "float32",
    "rope_theta": 10000.0,
    "vision_config": {"hidden_size": 4},
    "transformers_version": "5.23.0",
}


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Path]:
    """Write an export: ``export("a", {"w": tensor}, shards=2, config={...}, tokenizer={...})``."""

    def write(
        name: str,
        tensors: dict[str, Tensor],
        shards: int = 1,
        config: dict[str, Any] | None = None,
        tokenizer: dict[str, Any] | None = None,
    ) -> Path:
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}  # safetensors refuses shared memory
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG | (config or {})))
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}} | (tokenizer or {})))
        (folder / "manifest.json").write_text(json.dumps({"name": name}))
        if shards == 1:
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            return folder
        names = sorted(tensors)
        weight_map = {}
        for n in range(shards):
            file = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
            part = {key: tensors[key] for key in names[n::shards]}
            save_file(part, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder

    return write
