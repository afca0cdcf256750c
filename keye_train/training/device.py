"""What a device can do at most, for the model FLOPs utilisation (MFU; PaLM, arXiv 2204.02311, appendix B)."""

from __future__ import annotations

import logging
import resource
import time
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from keye_train.settings import Precision

logger = logging.getLogger(__name__)

# Part of a GPU's name -> dense TFLOP/s of matrix products with 16-bit inputs and with fp32 inputs (no TF32), from the
# makers' data sheets. The first that matches counts.
PEAKS = (
    ("H100 PCIe", 756.0, 51.0),
    ("H100 NVL", 835.0, 60.0),
    ("H100", 989.4, 66.9),
    ("H200", 989.4, 66.9),
    ("H800", 989.4, 66.9),
    ("H20", 148.0, 44.0),
    ("A100", 312.0, 19.5),
    ("A800", 312.0, 19.5),
    ("L40S", 362.0, 91.6),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71.0, 35.6),
)
MATRIX_SIZES = {"cuda": (4096,), "cpu": (128, 256, 512)}  # of the products that are timed where no data sheet is known
ROUNDS, REPEATS = 4, 2  # of every product
PAUSE_S = 0.02  # between two rounds: together they outlast what else keeps a machine busy for a moment
LIMIT_S = 0.4  # no product begins after that, and none that would take a tenth of it


def peak_flops(device: torch.device, precision: Precision, tflops: float | None = None) -> float:
    """Most operations a second of one device in the matrix products of a run.

    Args:
        device: of this rank.
        precision: of the run: its matrix products have 16-bit or fp32 inputs.
        tflops: by recipe, in TFLOP/s; None: from the name of the GPU, else measured.
    """
    if tflops is not None:
        return tflops * 1e12
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    for part, half, single in PEAKS:
        if part in name:
            return (single if precision == Precision.fp32 else half) * 1e12
    measured = measured_flops(device, torch.float32 if precision == Precision.fp32 else torch.bfloat16)
    logger.info("MFU is a share of %.3g TFLOP/s, what a bare matrix product reaches on this %s", measured / 1e12, name)
    return measured


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a bare square matrix product. Draws no random numbers.

    The best of several, because what else a machine does makes a product slower and never faster, and a peak that is
    too low shows as an MFU above 1. On a CPU of several sizes, by one thread and by all: on busy cores threads wait for
    each other, and some types have no fast product of large matrices.
    """
    threads = torch.get_num_threads()
    counts = [1, threads] if device.type == "cpu" and threads > 1 else [threads]
    turns = list(product(counts, _matrices(device, dtype), range(REPEATS)))
    best, end = 0.0, time.perf_counter() + LIMIT_S
    try:
        for number in range(ROUNDS):
            if number:
                time.sleep(PAUSE_S)
            for count, matrix, _ in turns:
                flops = 2 * len(matrix) ** 3
                if best and (time.perf_counter() > end or flops / best > LIMIT_S / 10):
                    continue
                torch.set_num_threads(count)
                best = max(best, flops / _seconds(matrix))
    finally:
        torch.set_num_threads(threads)
    return best


def _matrices(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    return [
        torch.linspace(-1, 1, size * size, device=device).reshape(size, size).to(dtype)
        for size in MATRIX_SIZES[device.type]
    ]


def _seconds(matrix: Tensor) -> float:
    """Time of its product with itself. Of one thread on a CPU the time that it ran, without that in which other
    processes had its core.
    """
    alone = matrix.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    _synchronize(matrix.device)
    began = clock()
    torch.mm(matrix, matrix)
    _synchronize(matrix.device)
    return clock() - began


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """Memory of this process: the most that tensors took on its GPU so far (0 on a CPU), and what is resident on the
    host. Neither waits for the device.
    """
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return on_device, pages * resource.getpagesize()
    except OSError:  # no Linux: the largest so far
        return on_device, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
