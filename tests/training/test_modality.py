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


def launched(out: Path, part: str) -> Path:
    """Folder with what the script wrote; two ranks are started once for all cases of a part."""
    ranks.forked(2, [str(Path(modality.__file__)), str(out), part])
    return out


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launched(tmp_path_factory.mktemp("modality"), "quick")


@pytest.fixture(scope="module")
def found_rest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launched(tmp_path_factory.mktemp("modality"), "rest")


@pytest.mark.parametrize("case", modality.QUICK, ids=lambda case: case.name)
def test_gradients_equal_one_process(found: Path, case: modality.Case) -> None:
    compare(found, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in modality.CASES if case not in modality.QUICK], ids=lambda case: case.name
)
def test_gradients_equal_one_process_in_the_other_cases(found_rest: Path, case: modality.Case) -> None:
    compare(found_rest, case)


def compare(found: Path, case: modality.Case) -> None:
    """Gradients of a case against those of the plain process."""
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
