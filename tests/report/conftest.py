"""A pipeline's folder with made-up numbers, and a real shard for the gallery."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from keye_train.data.indexing import build_index

EVIL = "<script>alert('x')</script>"


def write_run(folder: Path, stage: str, parent: str | None, sources: list[str], steps: int = 30) -> None:
    """A finished run with one line of metrics a step; step 4 was refused and has no gradient norm."""
    folder.mkdir(parents=True)
    recipe = {"stage": {"name": stage, "trainable": ["vision", "projector"], "mixture": "mix"}}
    manifest = {
        "status": "finished",
        "stage": stage,
        "parent": {"path": f"runs/demo/{parent}", "fingerprint": "0"} if parent else None,
        "recipe": recipe,
        "seed": 7,
        "world_size": 2,
        "commit": "0123456789abcdef+changes",
        "versions": {"torch": "2.13.0"},
        "started": "2026-01-02T03:04:05Z",
        "finished": "2026-01-02T03:05:05Z",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "recipe.yaml").write_text(f"stage: {{name: {stage}}} # {EVIL}\n")
    rows = [
        {
            "step": step,
            "loss": 4.0 / step,
            "loss_by_source": {source: 4.0 / step + n for n, source in enumerate(sources) if (step + n) % 3},
            "loss_by_task": {"reading": 4.0 / step},
            "lr": {"vision": 1e-3, "projector": 2e-3},
            "grad_norm": None if step == 4 else 1.0,
            "grad_norms": {"vision": None if step == 4 else 0.6, "projector": 0.8},
            "applied": step != 4,
            "balance": 0.9,
            "mfu": 0.4,
            "device_memory_bytes": 0,
            "host_memory_bytes": 3_000_000_000,
            "tokens": 1000,
            "samples": 20,
            "fill": 0.95,
            "tokens_per_s": 500.0,
            "step_s": 2.0,
            "data_wait_s": 0.1,
            "skipped": 0,
        }
        for step in range(1, steps + 1)
    ]
    for row in rows[9::10]:
        row["slowest_ranks"] = {"data_wait": {"rank": 1, "s": 0.3, "median_s": 0.1}}
        row["heldout_loss"] = {"ground": 5.0 / row["step"], "text": 6.0 / row["step"]}  # type: ignore[operator]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def png(size: tuple[int, int] = (64, 48)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path) -> Path:
    """Two samples: a grounding question on an image, and a text."""
    content = [{"type": "image", "image": "0.png"}, {"type": "text", "text": "Where?"}]
    box = "<|box_start|>[[100,200,300,400]]<|box_end|>"
    conversations = {
        "000": [{"role": "user", "content": content}, {"role": "assistant", "content": box}],
        "001": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}],
    }
    with tarfile.open(path, "w") as tar:
        for key, messages in conversations.items():
            members = {f"{key}.json": json.dumps({"messages": messages}).encode()}
            if key == "000":
                members["000.0.png"] = png()
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    names = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
    core = Tokenizer(models.BPE({token: i for i, token in enumerate([f"<|{name}|>" for name in names])}, []))
    build_index(path, PreTrainedTokenizerFast(tokenizer_object=core), "test")
    return path


def sample(shard: Path, key: str, task: str, expected: str, generated: str, score: float) -> dict[str, Any]:
    return {
        "task": task,
        "key": key,
        "shard": str(shard),
        "metric": "box_iou" if task == "ground" else "exact",
        "question": "[image] Where?" if task == "ground" else "2 + 2?",
        "expected": expected,
        "generated": generated,
        "score": score,
        "correct": score >= 0.5,
    }


def model(name: str, shard: Path, ground: float, text: float, answer: str) -> dict[str, Any]:
    """An evaluated model; ``ground`` and ``text`` are its scores."""

    def task(score: float) -> dict[str, Any]:
        return {"score": score, "low": score - 0.05, "high": score + 0.05, "n": 40, "loss": 1 - score, "chance": 0.25}

    return {
        "name": name,
        "kind": "keye",
        "tasks": {"ground": task(ground), "text": task(text)},
        "mean_score": (ground + text) / 2,
        "mean_low": (ground + text) / 2 - 0.03,
        "mean_high": (ground + text) / 2 + 0.03,
        "mean_loss": 1 - (ground + text) / 2,
        "retrieval": None,
        "zeroshot": None,
        "samples": [
            sample(shard, "000", "ground", "<|box_start|>[[100,200,300,400]]<|box_end|>", answer, 0.0),
            sample(shard, "001", "text", "4", f"{name} says {EVIL}", 0.0),
        ],
    }


@pytest.fixture
def run_writer() -> Callable[..., None]:
    """:func:`write_run`, for tests that want runs of their own."""
    return write_run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """stage0 -> two branches -> merge, evaluated."""
    folder = tmp_path / "demo"
    write_run(folder / "stage0", "0_vision", None, ["pairs"])
    write_run(folder / "branch_a", "3_anneal", "stage0", ["ocr", "caption"])
    write_run(folder / "branch_b", "3_anneal", "stage0", ["ocr", "caption"])
    line = {"step": 2, "source": "ocr", "shard": "x.tar", "key": "9", "reason": "image cannot be decoded"}
    (folder / "branch_a" / "ledger.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "branch_a" / "ledger.rank1.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "merge").mkdir()
    merge = {
        "method": "uniform",
        "tensors": 12,
        "bytes": 4096,
        "dtype": ["float32"],
        "parents": [{"path": f"runs/demo/branch_{x}/export", "weight": 0.5} for x in "ab"],
    }
    (folder / "merge" / "manifest.json").write_text(json.dumps(merge))
    shard = write_shard(tmp_path / "heldout.tar")
    recall = {"score": 0.875, "low": 0.8, "high": 0.9, "chance": 0.02}
    ways = {way: {"r1": recall, "r5": recall} for way in ("image_to_text", "text_to_image")}
    towers = {"name": "stage0", "kind": "dual_encoder", "tasks": {}, "samples": [], "retrieval": {"n": 50, **ways}}
    towers["zeroshot"] = {"digit": {"score": 0.625, "low": 0.5, "high": 0.7, "chance": 0.125, "n": 64, "classes": 10}}
    results = {
        "tasks": [
            {"name": "ground", "metric": "box_iou", "n": 40, "chance": 0.25, "skipped": []},
            {"name": "text", "metric": "exact", "n": 40, "chance": 0.25, "skipped": [{"reason": "x"}]},
        ],
        "models": [
            towers,
            model("branch_a", shard, 0.5123, 0.6, "garbage"),
            model("branch_b", shard, 0.4, 0.7345, "garbage"),
            model("merge", shard, 0.7, 0.7, "<|box_start|>[[600,700,800,900]]<|box_end|>"),
        ],
    }
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "results.json").write_text(json.dumps(results))
    state = {"name": "demo run", "stages": [{"name": n} for n in ("stage0", "branch_b", "branch_a")], "commit": "abc"}
    (folder / "pipeline.json").write_text(json.dumps(state))
    return folder
