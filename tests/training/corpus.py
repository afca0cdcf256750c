"""A small real corpus: shards of texts, pictures, picture pairs and clips, a tokenizer, and recipes that use it."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import ranks
from PIL import Image
from transformers import PreTrainedTokenizerFast

from data_tools.demo.tokenizer import conversation_texts, train_tokenizer
from data_tools.shards import sample_key, write_shard
from keye_train.compose import load_settings
from keye_train.data.index import tokenizer_fingerprint
from keye_train.data.indexing import build_index
from keye_train.settings import TrainSettings

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200), "white": (240, 240, 240)}

# A toy Keye: every kind of part, a few thousand numbers each. Ids as the demo's tokenizer gives them.
MODEL = """
name: toy
tokenizer: {folder}/tokenizer
vision:
  {{hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2, image_size: 56}}
language:
  vocab_size: 1536
  hidden_size: 32
  intermediate_size: 48
  num_hidden_layers: 2
  num_attention_heads: 2
  num_key_value_heads: 1
  head_dim: 16
  max_position_embeddings: 512
  rope_theta: 10000.0
  mrope_section: [2, 3, 3]
special_tokens:
  {{bos: 0, eos: 2, pad: 0, vision_start: 9, vision_end: 10, vision_pad: 11, image_pad: 12, video_pad: 13}}
text_tower:
  vocab_size: 1536
  hidden_size: 32
  intermediate_size: 48
  num_hidden_layers: 1
  num_attention_heads: 2
  max_tokens: 12
start: {{random: true}}
"""
DATA = """
name: toy
root: {folder}
sources:
  pairs: {{shards: ["${{data.root}}/pairs-*.tar"]}}
  images: {{shards: ["${{data.root}}/images-*.tar"]}}
  clips: {{shards: ["${{data.root}}/clips-*.tar"]}}
  text: {{shards: ["${{data.root}}/text-*.tar"]}}
heldout: # the same shards: nothing is learned about generalisation here
  images: {{shards: ["${{data.root}}/images-*.tar"]}}
  clips: {{shards: ["${{data.root}}/clips-*.tar"]}}
  text: {{shards: ["${{data.root}}/text-*.tar"]}}
heldout_pairs: {{shards: ["${{data.root}}/pairs-*.tar"]}}
mixtures:
  vision: {{pairs: 1.0}}
  align: {{pairs: 1.0}}
  multitask: {{pairs: 0.2, images: 0.4, clips: 0.2, text: 0.2}}
  anneal: {{images: 1.0}}
resolution:
  image_min_tokens: 1
  image_max_tokens: 16
  video_frame_min_tokens: 1
  video_frame_max_tokens: 4
  video_max_tokens: 16
window_samples: 64
workers: 0
max_skipped_fraction: 0.5
"""
# A pack of 150 tokens holds two or three samples, so packs are text-only, pictures, clips and mixtures of them.
OVERRIDES = (
    "model=toy",
    "data=toy",
    "deepspeed=cpu",
    "stage.steps=4",
    "stage.max_tokens=150",
    "stage.max_patches=200",
    "stage.global_batch_packs=4",
    "stage.schedule.warmup_steps=1",
    "stage.activation_checkpointing=none",
    "stage.optimizer.lr=1e-3",
    "logging.tensorboard=false",
)


@dataclass(frozen=True)
class ToyCorpus:
    """Where it lies; ``recipes`` are the shipped ones and ``model=toy data=toy``."""

    folder: Path
    recipes: Path

    def overrides(self, stage: str, run_dir: Path, *more: str) -> list[str]:
        """Overrides of a short run."""
        decay = ["stage.schedule.decay_steps=1"] if stage == "2_multitask" else []
        return [f"stage={stage}", *OVERRIDES, *decay, f"run_dir={run_dir}", *more]

    def settings(self, stage: str, run_dir: Path, *more: str) -> TrainSettings:
        """Settings of a short run."""
        return load_settings(TrainSettings, "train", self.overrides(stage, run_dir, *more), str(self.recipes))

    def command(self, launcher: list[str], stage: str, run_dir: Path, *more: str) -> list[str]:
        """``keye-train`` behind a launcher's words, which end with what starts a module."""
        return [*launcher, "keye_train", *self.words(stage, run_dir, *more)]

    def words(self, stage: str, run_dir: Path, *more: str) -> list[str]:
        """What ``keye-train`` is given on its command line."""
        return ["--recipes", str(self.recipes), *self.overrides(stage, run_dir, *more)]


def write_corpus(folder: Path) -> ToyCorpus:
    """Write shards, tokenizer and recipes."""
    sources = {"pairs": _pairs(24), "images": _images(24), "clips": _clips(8), "text": _texts(16)}
    chats = [json.loads(sample["json"]) for samples in sources.values() for sample in samples]
    train_tokenizer([text for chat in chats for text in conversation_texts(chat["messages"])], folder / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    fingerprint = tokenizer_fingerprint(folder / "tokenizer")
    for name, samples in sources.items():
        shard = folder / f"{name}-0.tar"
        write_shard(shard, ((sample_key(number), members) for number, members in enumerate(samples)))
        build_index(shard, tokenizer, fingerprint)
    recipes = folder / "recipes"
    shutil.copytree(ranks.ROOT / "recipes", recipes)
    (recipes / "model" / "toy.yaml").write_text(MODEL.format(folder=folder))
    (recipes / "data" / "toy.yaml").write_text(DATA.format(folder=folder))
    return ToyCorpus(folder, recipes)


def _picture(colour: str, width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 60, (height, width, 3)) + np.array(COLOURS[colour]) // 2
    return Image.fromarray(pixels.astype(np.uint8))


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


def _chat(question: str, answer: str, task: str, *media: tuple[str, str]) -> bytes:
    content = [{"type": kind, kind: name} for kind, name in media] + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages, "task": task}).encode()


def _pairs(count: int) -> list[dict[str, bytes]]:
    names = list(COLOURS)
    return [
        {
            "0.jpg": _jpeg(_picture(names[n % 4], 40 + 14 * (n % 3), 56, n)),
            "json": _chat("Describe.", f"a {names[n % 4]} field", "caption", ("image", "0.jpg")),
        }
        for n in range(count)
    ]


def _images(count: int) -> list[dict[str, bytes]]:
    """One picture, or two; one file is cut short, which its header does not show."""
    names = list(COLOURS)
    samples = []
    for n in range(count):
        first, second = names[n % 4], names[(n + 1) % 4]
        media = [("image", "0.jpg"), ("image", "1.jpg")][: 1 + n % 2]
        members = {"0.jpg": _jpeg(_picture(first, 60, 40 + 20 * (n % 4), n))}
        if len(media) == 2:
            members["1.jpg"] = _jpeg(_picture(second, 40, 40, n + 100))
        if n == 5:
            members["0.jpg"] = members["0.jpg"][: len(members["0.jpg"]) // 2]
        answer = first if len(media) == 1 else f"{first} and {second}"
        samples.append(members | {"json": _chat("Which colours?", answer, "colour", *media)})
    return samples


def _clips(count: int) -> list[dict[str, bytes]]:
    names = list(COLOURS)
    samples = []
    for n in range(count):
        file = io.BytesIO()
        with av.open(file, "w", format="mp4") as container:
            stream = container.add_stream("mpeg4", rate=8)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for frame in range(12):
                colour = names[(n + frame // 6) % 4]
                container.mux(stream.encode(av.VideoFrame.from_image(_picture(colour, 64, 48, frame))))
            container.mux(stream.encode())
        answer = f"from {names[n % 4]} to {names[(n + 1) % 4]}"
        samples.append({"0.mp4": file.getvalue(), "json": _chat("What changes?", answer, "video", ("video", "0.mp4"))})
    return samples


def _texts(count: int) -> list[dict[str, bytes]]:
    return [{"json": _chat(f"What is {n} plus {n + 1}?", f"It is {2 * n + 1}.", "text")} for n in range(count)]
