"""Promise: whenever a process dies, a whole checkpoint of a step that once had one is still there."""

from __future__ import annotations

from pathlib import Path

import pytest

from keye_train import runs
from keye_train.checkpoints import folder, layout


class KillError(BaseException):
    """The process dies here."""


def write(place: Path, value: int, marked: bool = False) -> Path:
    """Commit a checkpoint of step 4 that holds one number."""
    final = place / "step-4"
    aside = folder.aside(final)
    aside.mkdir(parents=True)
    folder.commit(final, {}, {layout.STATE: value}, marked)
    return final


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def test_a_step_that_is_saved_again_keeps_its_mark(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "step-4" / layout.KEEP).touch()
    final = write(tmp_path, 2)
    assert runs.read_json(final / layout.STATE) == 2
    assert (final / layout.KEEP).exists()
    assert names(tmp_path) == ["step-4"]


@pytest.mark.parametrize("renames", range(2))
@pytest.mark.parametrize("killed", [False, True])
def test_an_old_one_goes_only_when_the_new_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int, killed: bool
) -> None:
    """Of the two renames of a commit, one fails or is the last thing that the process lives to see."""
    final = write(tmp_path, 1)
    real, done = Path.rename, 0

    def rename(self: Path, target: Path) -> Path:
        nonlocal done
        done += self.parent == tmp_path
        if done == renames + 1 and self.parent == tmp_path:
            raise KillError if killed else OSError("the disk fails")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(KillError if killed else OSError):
            write(tmp_path, 2)
    if not killed:
        assert runs.read_json(final / layout.STATE) == 1
    folder.clear_unfinished(tmp_path)
    assert names(tmp_path) == ["step-4"]
    assert folder.fault(final) is None
    assert runs.read_json(final / layout.STATE) in (1, 2)


def test_one_that_was_not_whole_is_cleared(tmp_path: Path) -> None:
    final = write(tmp_path, 1)
    torn = final.rename(folder.aside(final))
    (torn / layout.STATE).write_text("3\n")
    folder.clear_unfinished(tmp_path)
    assert names(tmp_path) == []
