"""What the user names as a model: a run, an export, a checkpoint of a run, or any folder of safetensors.

Pickles are never loaded: they can run code. Folders that hold nothing else are refused, with the way to convert them.
"""

from __future__ import annotations

import re
from pathlib import Path

from keye_train.merging.places import WEIGHTS, WEIGHTS_INDEX
from keye_train.merging.reading import ExportReader
from keye_train.runs import CHECKPOINTS, export_dir
from keye_train.settings import SettingsError

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NUMBERED = re.compile(r".*?(\d+)")


def open_model(path: str | Path) -> ExportReader:
    """Open a model for reading.

    Raises:
        FileNotFoundError: nothing is there, or a file is missing.
        SettingsError: it holds pickles only.
        ExportError: a file is cut off.
    """
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist: name a run folder, an export or a checkpoint")
    _refuse_pickles(folder)
    return ExportReader(export_dir(folder))


def last_checkpoints(run: str | Path, count: int) -> list[str]:
    """The last ``count`` checkpoints of a run, oldest first.

    ``run`` is a run folder (its RUN/checkpoints/step-N), or any folder whose subfolders end in a number and hold models
    (``checkpoint-500`` and the like).

    Raises:
        SettingsError: there are fewer.
    """
    folder = Path(run)
    inside = folder / CHECKPOINTS if (folder / CHECKPOINTS).is_dir() else folder
    numbered = []
    for path in inside.iterdir() if inside.is_dir() else ():
        number = _NUMBERED.fullmatch(path.name)
        if number and path.is_dir() and not path.name.startswith("."):
            numbered.append((int(number[1]), str(path)))
    if len(numbered) < count:
        raise SettingsError(
            f"models=[{run}] last={count}: {inside} holds {len(numbered)} checkpoint(s); take a smaller last, or keep "
            "more of them (checkpoint.keep)"
        )
    return [path for _, path in sorted(numbered)[-count:]]


def _refuse_pickles(folder: Path) -> None:
    states = next(iter([*folder.glob("**/*_optim_states.pt"), *folder.glob("**/mp_rank_*_model_states.pt")]), None)
    if states is not None:
        raise SettingsError(
            f"{folder} is a folder of DeepSpeed's save_checkpoint: {states.name} is a pickle, which can run code, and "
            "is not read here. If you trust whoever wrote it, convert it where it can do no harm: "
            f"python zero_to_fp32.py {folder} CONVERTED --safe_serialization (the script lies in the folder), put "
            "config.json and the tokenizer's files beside the result, and name CONVERTED"
        )
    if any((folder / name).exists() for name in (WEIGHTS, WEIGHTS_INDEX)):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise SettingsError(
            f"{folder} holds no safetensors but {pickles[0]}, a pickle, which can run code and is not read here. If "
            "you trust whoever wrote it, load it with transformers and save_pretrained(FOLDER), and name that folder"
        )
