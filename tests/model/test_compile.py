"""Promise: compiled layers give the plain numbers, and packs of other lengths compile nothing again."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKS = (("text", "image"), ("video",), ("image_and_video", "two_images"))


def script(backend: str) -> None:
    """In a process of its own: the compiler's switches and caches belong to the process."""
    import golden
    import torch
    from torch._dynamo.utils import counters

    from keye_train.model import compile_layers

    torch.set_num_threads(1)
    plain, compiled = golden.tiny_model(), golden.tiny_model()
    compile_layers(compiled, backend)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for number, samples in enumerate((golden.SAMPLES, *PACKS)):
        inputs = golden.pack(samples, plain.config)
        losses = [model.forward_packed(inputs) for model in (plain, compiled)]
        assert torch.allclose(*losses, atol=2e-5), samples
        for model, loss in zip((plain, compiled), losses, strict=True):
            model.zero_grad()
            loss.sum().backward()
        named = dict(compiled.named_parameters())
        for name, parameter in plain.named_parameters():
            if parameter.grad is not None:
                limit = 2e-5 * parameter.grad.norm() + 2e-7 * parameter.numel() ** 0.5
                assert (named[name].grad - parameter.grad).norm() <= limit, name
        if number == 0:
            first = counters["stats"]["unique_graphs"]
            assert first > 0, "nothing was compiled"
            torch._dynamo.config.error_on_recompile = True
    assert counters["stats"]["unique_graphs"] == first


@pytest.mark.parametrize(
    "backend",
    [
        "eager",  # captures graphs and guards, which decide whether a pack compiles again
        pytest.param(
            "inductor",
            marks=[pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")],
        ),
    ],
)
def test_compiled_layers(backend: str) -> None:
    here = Path(__file__).parent
    code = f"import sys; sys.path.insert(0, {str(here)!r}); import test_compile; test_compile.script({backend!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=here.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
