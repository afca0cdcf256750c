"""Promise: whatever stands in a shard, a pass over it ends; bad samples have their reason, odd ones are read right."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from bad_corpus import READ, kinds, write_damaged, write_hostile_tar, write_kinds
from test_loader import make_loader
from toy_shards import toy_settings
from transformers import PreTrainedTokenizerFast

from keye_train.data.index import tokenizer_fingerprint
from keye_train.data.indexing import build_index
from keye_train.model.images import decode_image
from keye_train.settings import ResolutionSettings, SourceSettings


@pytest.fixture(scope="module")
def became(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, tokenizer_dir: Path
) -> dict[str, str]:
    """Key -> why it was skipped, or ``READ``, after one epoch over everything with a reader process."""
    folder = tmp_path_factory.mktemp("bad")
    write_kinds(folder / "kinds.tar", folder)
    write_hostile_tar(folder / "hostile.tar")
    write_damaged(folder)
    for shard in sorted(folder.glob("*.tar")):
        build_index(shard, tokenizer, tokenizer_fingerprint(tokenizer_dir))
    settings = toy_settings({"a": SourceSettings([f"{folder}/*.tar"])}, tokenizer_dir, workers=1, steps=1000)
    settings.stage.global_batch_packs = 1
    found: dict[str, str] = {}
    with make_loader(settings) as loader:
        settings.data.window_samples = total = len(loader._plan.source(0))
    with make_loader(settings) as loader:
        for step in loader:
            found |= {Path(ref.shard).stem + "/" + ref.key: reason for ref, reason in step.dropped}
            for pack in step.packs:
                found |= {Path(ref.shard).stem + "/" + ref.key: reason for ref, reason in pack.skipped}
                found |= {Path(ref.shard).stem + "/" + ref.key: READ for ref in pack.refs}
            if sum(step.plan_state_after.drawn) >= 3 * total:
                break
    assert not (folder / "pwned").exists()
    assert not Path("pwned").exists()
    return found


def check(reason: str | None, expected: str, name: str) -> str | None:
    if reason is None:
        return f"{name}: neither trained nor skipped"
    sound = reason == READ if expected == READ else re.search(expected, reason)
    return None if sound else f"{name}: expected {expected or 'to be read'!r}, got {reason!r}"


def test_each_kind_is_read_or_has_its_reason(became: dict[str, str], tmp_path: Path) -> None:
    all_kinds = kinds(tmp_path)
    assert len({kind.name for kind in all_kinds}) == len(all_kinds) >= 55
    expected = {f"kinds/{kind.name}": kind.reason for kind in all_kinds}
    expected |= {f"hostile/{key}": reason for key, reason in write_hostile_tar(tmp_path / "x.tar").items()}
    wrong = [check(became.get(name), reason, name) for name, reason in expected.items()]
    assert [line for line in wrong if line] == []


@pytest.mark.parametrize("shard", ["torn", "zero", "nottar", "forged"])
def test_damaged_archives_are_named(became: dict[str, str], shard: str) -> None:
    reasons = [reason for name, reason in became.items() if name.startswith(shard + "/")]
    assert any("damaged" in reason or "cut off" in reason for reason in reasons)
    if shard == "torn":
        assert became["torn/a"] == READ


@pytest.mark.parametrize(
    ("name", "colour"),
    [
        ("cmyk", (255, 0, 0)),
        ("deep", (156, 156, 156)),  # 40,000 / 256
        ("greyalpha", (255, 255, 255)),  # transparent on white
        ("palette", (0, 0, 255)),
        ("gif", (200, 200, 200)),  # first frame
        ("animwebp", (200, 200, 200)),
        ("apng", (200, 200, 200)),
        ("exif", (255, 0, 0)),
        ("wrongending", None),
    ],
)
def test_odd_pictures_are_read_right(name: str, colour: tuple[int, int, int] | None, tmp_path: Path) -> None:
    (members,) = (kind.members for kind in kinds(tmp_path) if kind.name == name)
    (data,) = (data for suffix, data in members.items() if suffix != "txt")
    patches, grid = decode_image(data, ResolutionSettings())
    if colour is not None:
        assert np.abs(patches.transpose(0, 2, 3, 1) - np.array(colour)).max() <= 3
    assert grid == {"exif": (1, 6, 4), "wrongending": (1, 4, 4)}.get(name, (1, 4, 4))
