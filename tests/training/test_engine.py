"""One global batch gives one update, however it is split; resuming and refusing work at every ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from safetensors.torch import load_file
from torch import Tensor
from toy import CASES, CROSSINGS, Toy, settings

from keye_train.settings import SettingsError
from keye_train.training.engine import deepspeed_config

TOY = str(Path(__file__).with_name("toy.py"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """World size -> folder with what the toy script wrote."""
    folders = {world_size: tmp_path_factory.mktemp(f"world{world_size}") for world_size in (1, 2)}
    ranks.forked(1, [TOY, str(folders[1])])
    ranks.forked(2, [TOY, str(folders[2]), str(folders[1])])
    return folders


def tensors(folder: Path, case: str, kind: str) -> dict[str, Tensor]:
    held = load_file(folder / f"{case}.safetensors")
    return {name.removeprefix(f"{kind}/"): tensor for name, tensor in held.items() if name.startswith(f"{kind}/")}


def figures(folder: Path, case: str) -> dict:
    return json.loads((folder / "figures.json").read_text())[case]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_weights_moments_and_norms_equal_the_plain_run(trained: dict[int, Path], world_size: int, case: str) -> None:
    """4 packs on 1 rank or 2 x 2, whatever the ZeRO stage: same updates, with clipping active."""
    reference = tensors(trained[1], "zero0", "end")
    ours = tensors(trained[world_size], case, "end")
    bf16 = case.endswith("bf16")
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        if not bf16:
            torch.testing.assert_close(
                ours[name], expected, rtol=2e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
            )
        elif "#" not in name:  # bf16 gradients: six steps of Adam at 1e-2 may drift by a few of them
            torch.testing.assert_close(ours[name], expected, rtol=0, atol=3e-2)
    norms = figures(trained[1], "zero0")["norms"]
    assert figures(trained[world_size], case)["norms"] == pytest.approx(norms, rel=2e-2 if bf16 else 1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_norms_of_modules_are_the_parts_of_the_global_norm(
    trained: dict[int, Path], world_size: int, case: str
) -> None:
    ours, plain = figures(trained[world_size], case), figures(trained[1], "zero0")["module_norms"]
    rel = 2e-2 if case.endswith("bf16") else 1e-5
    for norms, expected, whole in zip(ours["module_norms"], plain, ours["norms"], strict=True):
        assert norms == pytest.approx(expected, rel=rel)
        assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(whole, rel=rel)


def test_the_average_follows_the_weights(trained: dict[int, Path]) -> None:
    """The averages of all splits are held to those of the plain run above, as moments are."""
    end = tensors(trained[1], "zero0", "end")
    moved = [name for name in end if "#" not in name and not torch.equal(end[name], end[f"{name}#average"])]
    assert moved == [name for name in end if "#" not in name]
    start = Toy().state_dict()
    for name in moved:  # between where it started and where the weights are
        assert (end[f"{name}#average"] - end[name]).norm() < (start[name] - end[name]).norm()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_equals_uninterrupted_bit_for_bit(trained: dict[int, Path], world_size: int, case: str) -> None:
    end, resumed = (tensors(trained[world_size], case, kind) for kind in ("end", "resumed"))
    assert [name for name in end if not torch.equal(end[name], resumed[name])] == []


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_checkpoint_is_the_state_at_its_step(trained: dict[int, Path], world_size: int, case: str) -> None:
    """Though the training went on while it was written; no slice is lost, doubled or shifted."""
    assert figures(trained[world_size], case)["stored_otherwise"] == []


@pytest.mark.parametrize("case", CROSSINGS)
def test_another_world_size_and_stage_take_over_the_exact_state(trained: dict[int, Path], case: str) -> None:
    assert figures(trained[2], case)["crossed"] == []


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_frozen_parameters_keep_their_bits(trained: dict[int, Path], world_size: int, case: str) -> None:
    frozen = tensors(trained[world_size], case, "frozen")
    dtype = torch.bfloat16 if case.endswith("bf16") else torch.float32
    assert set(frozen) == {"frozen.weight", "frozen.bias"}
    for name, tensor in frozen.items():
        assert torch.equal(tensor, Toy().get_parameter(name).to(dtype).float())
        assert name not in tensors(trained[world_size], case, "end")  # nor in the checkpoint


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_gradient_that_is_nan_on_one_rank_changes_nothing(
    trained: dict[int, Path], world_size: int, case: str
) -> None:
    applied, unchanged, recovered = figures(trained[world_size], case)["refused"]
    assert not applied
    assert unchanged  # weights and moments, bit for bit
    assert recovered


def test_parameters_on_nvme_need_an_extension_that_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = settings(3, "bf16", True)
    recipe.deepspeed.nvme_path = "/local_nvme"
    if not AsyncIOBuilder().is_compatible():
        with pytest.raises(SettingsError, match=r"deepspeed\.nvme_path=/local_nvme.*libaio-dev"):
            deepspeed_config(recipe)
        monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda _: True)
    offloaded = deepspeed_config(recipe)["zero_optimization"]["offload_param"]
    assert (offloaded["device"], offloaded["nvme_path"]) == ("nvme", "/local_nvme")
