"""Every rank runs the same modules whatever its pack holds: two ranks with every pair of kinds of packs, under every
ZeRO stage and freeze pattern, neither hang nor miss a gradient that one process finds."""

from __future__ import annotations

from pathlib import Path

import modality
import pytest
import ranks
from safetensors.torch import load_file
from torch import Tensor

from keye_train.model import module_parameters

pytestmark = pytest.mark.timeout(480)  # one launch computes all cases


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what the script wrote; two ranks are started once for all cases."""
    out = tmp_path_factory.mktemp("modality")
    ranks.run([*ranks.torchrun(2), str(Path(modality.__file__)), str(out)], timeout_s=420)
    return out


@pytest.mark.parametrize("case", modality.CASES, ids=lambda case: case.name)
def test_gradients_equal_one_process(found: Path, case: modality.Case) -> None:
    plain = load_file(found / f"plain-{case.objective}.safetensors")
    ours = load_file(found / f"{case.name}.safetensors")
    modules = module_parameters(modality.model_of(case.objective))
    names = {name for module in case.trainable for name, _ in modules[module]}
    assert set(ours) == {f"{batch}/{name}" for batch in range(len(case.batches)) for name in names}
    for name, gradient in ours.items():
        expected = plain[name]
        # A gradient that is zero in exact arithmetic (a shift of all keys, say) is pure rounding: absolute floor.
        limit = 2e-5 * expected.norm().item() + 1e-6 * expected.numel() ** 0.5
        assert (gradient - expected).norm().item() <= limit, name


def test_every_pair_of_kinds_occurs() -> None:
    together = {frozenset(pair) for batch in modality.PACK_BATCHES for pair in batch}
    kinds = len(modality.KINDS)
    assert len(together) == kinds * (kinds + 1) // 2


def test_the_gradients_are_not_all_rounding(found: Path) -> None:
    """Else the comparison above would prove nothing."""
    for objective in ("language", "contrastive", "captions"):
        plain: dict[str, Tensor] = load_file(found / f"plain-{objective}.safetensors")
        small = {name for name, gradient in plain.items() if gradient.norm() < 1e-4}
        assert all("k_proj.bias" in name for name in small), small
