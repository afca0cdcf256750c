"""The tiny model of tests/golden and prompts for it; toy exports and shards to evaluate."""

from __future__ import annotations

import io
import json
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from keye_train.data.index import tokenizer_fingerprint
from keye_train.data.indexing import build_index
from keye_train.model.configuration import KeyeConfig
from keye_train.model.keye import KeyeForConditionalGeneration
from keye_train.model.pretrained import save_export
from keye_train.model.sample_encoder import EncodedSample
from keye_train.model.start import initial_dual_encoder, initial_model
from keye_train.sample import SampleRef
from keye_train.settings import (
    LanguageModelSettings,
    ModelSettings,
    SpecialTokenSettings,
    StartWeightsSettings,
    TextTowerSettings,
    VisionTowerSettings,
)

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


SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|box_start|>",
    "<|box_end|>",
)


def toy_settings(folder: Path) -> ModelSettings:
    """A model of a few thousand parameters, and a byte tokenizer for it, written to ``folder``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*SPECIALS, *alphabet))}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIALS[:8]))
    core.add_tokens([AddedToken(token, normalized=False) for token in SPECIALS[8:]])
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|endoftext|>", eos_token="<|im_end|>", bos_token="<|endoftext|>"
    ).save_pretrained(folder)
    ids = {name: SPECIALS.index(f"<|{name}|>") for name in ("vision_start", "vision_end", "vision_pad")}
    return ModelSettings(
        name="toy",
        tokenizer=str(folder),
        vision=VisionTowerSettings(32, 48, 1, 2, image_size=56),
        language=LanguageModelSettings(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=512,
            mrope_section=[2, 3, 3],
            initializer_range=0.2,
        ),
        special_tokens=SpecialTokenSettings(bos=0, eos=2, pad=0, image_pad=6, video_pad=7, **ids),
        text_tower=TextTowerSettings(len(vocabulary), 32, 48, 1, 2, max_tokens=16),
        start=StartWeightsSettings(random=True),
    )


def write_exports(folder: Path, settings: ModelSettings, seeds: dict[str, int]) -> list[str]:
    """Exports of random models; ``towers`` is one of Stage 0."""
    extra = {file.name: file for file in Path(settings.tokenizer).iterdir()}
    for name, seed in seeds.items():
        make = initial_dual_encoder if name == "towers" else initial_model
        model = make(settings, seed=seed)
        save_export(model.state_dict().items(), model.config, folder / name, extra_files=extra)
    return [str(folder / name) for name in seeds]


def png(colour: tuple[int, int, int], size: tuple[int, int] = (56, 56)) -> bytes:
    """An image of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def question(text: str, reply: str, image: bytes | None = None, **fields: Any) -> dict[str, bytes]:
    """Members of a sample: one question, with a picture or without."""
    content = [{"type": "image", "image": "0.png"}] if image else []
    messages = [
        {"role": "user", "content": [*content, {"type": "text", "text": text}]},
        {"role": "assistant", "content": reply},
    ]
    record = {"messages": messages, "answer": reply, "metric": "exact"} | fields
    return {"json": json.dumps(record).encode()} | ({"0.png": image} if image else {})


def write_shard(path: Path, samples: list[dict[str, bytes]], tokenizer: str) -> Path:
    """A shard with its index."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, members in enumerate(samples):
            for name, data in members.items():
                info = tarfile.TarInfo(f"{number:04d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    build_index(path, PreTrainedTokenizerFast.from_pretrained(tokenizer), tokenizer_fingerprint(tokenizer))
    return path
