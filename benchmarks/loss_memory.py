"""Memory of the token loss, forward and backward, bfloat16 with 4096-wide hidden states of all rows labelled.

    python -m benchmarks.loss_memory [--full]

Peak of what torch's allocator hands out above hidden states, output matrix and the gradient of that matrix, which any
loss needs (1.24 GB each for the matrices of 151,936 words). The gradient of the hidden states is counted. The
loss walks blocks of the vocabulary, so the vocabulary's size changes the number of blocks, not their memory: on a CPU
the long row runs over a part of it. `--full`, and a GPU, run all 151,936. Plain: `F.cross_entropy` on float32
logits; its figure is too low by the gradient of the matrix, which does not exist yet at its peak.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.results import Result
from keye_train.model.loss import linear_cross_entropy

WIDTH, VOCAB = 4096, 151_936
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits at once."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


def measure(loss: Loss, rows: int, vocab: int, device: torch.device) -> tuple[float, float]:
    """Peak above inputs and the weight's gradient in GB, and seconds."""
    generator = torch.Generator(device).manual_seed(0)
    options = {"dtype": torch.bfloat16, "device": device, "generator": generator}
    hidden = torch.randn(rows, WIDTH, **options).requires_grad_()
    weight = torch.randn(vocab, WIDTH, **options).mul_(0.02).requires_grad_()
    targets = torch.randint(vocab, (rows,), device=device, generator=generator)

    def step() -> None:
        loss(hidden, weight, targets).mean().backward()

    began = time.perf_counter()
    peak = cuda_peak(step) if device.type == "cuda" else cpu_peak(step)
    own = weight.numel() * weight.element_size()
    return (peak - own) / 1e9, time.perf_counter() - began


def cuda_peak(step: Callable[[], None]) -> int:
    """Bytes above what is allocated now."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cpu_peak(step: Callable[[], None]) -> int:
    """The same on the CPU, from the profiler's record of every allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event["args"] for event in events if event.get("name") == "[memory]"]
    changes = [change for change in changes if change["Device Type"] == 0]
    held, peak = 0, 0
    for change in changes:
        held += change["Bytes"]
        peak = max(peak, held)
    return peak


def main() -> None:
    """Print and store the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    whole = "--full" in sys.argv or device.type == "cuda"
    result = Result("loss", __doc__ or "")
    cases: list[tuple[str, Loss, int, int]] = [
        ("blocks", linear_cross_entropy, 32_768, VOCAB if whole else 8_192),
        ("blocks", linear_cross_entropy, 1_024, VOCAB),
        ("plain", plain, 1_024, VOCAB),
    ]
    for name, loss, rows, vocab in cases:
        peak_gb, seconds = measure(loss, rows, vocab, device)
        result.add(
            {
                "loss": name,
                "rows": rows,
                "vocabulary": vocab,
                "hidden states, GB": round(rows * WIDTH * 2 / 1e9, 3),
                "peak above them, GB": round(peak_gb, 3),
                "seconds": round(seconds, 1),
                "device": device.type,
            }
        )
    result.write()


if __name__ == "__main__":
    main()
