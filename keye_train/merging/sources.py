"""What the user names as a model: a run, an export, a checkpoint of a run, or any folder of safetensors.

Pickles are never loaded: they can run code. Folders that hold nothing else are refused, with the way to convert them.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from keye_train.checkpoints import WEIGHTS as STATE_OF_WEIGHTS
from keye_train.checkpoints import CheckpointReader
from keye_train.checkpoints.layout import COMPLETE, INDEX, slice_key
from keye_train.checkpoints.layout import MANIFEST as LAYOUT_MANIFEST
from keye_train.merging.places import Span, TensorPlace, file_places, tensor_places
from keye_train.merging.reading import ExportReader, open_files_each
from keye_train.runs import (
    CHECKPOINTS,
    EXPORT,
    MANIFEST,
    WEIGHTS,
    WEIGHTS_INDEX,
    export_dir,
    read_json,
    write_json_atomic,
)
from keye_train.settings import SettingsError

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NUMBERED = re.compile(r".*?(\d+)")


def open_model(path: str | Path) -> ExportReader:
    """Open a model for reading.

    Raises:
        FileNotFoundError: nothing is there, or a file is missing.
        SettingsError: it holds pickles only, or is a checkpoint without its parent.
        ExportError: a file is cut off.
    """
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist: name a run folder, an export or a checkpoint")
    _refuse_pickles(folder)
    if (folder / COMPLETE).exists():
        return _open_checkpoint(folder)
    return ExportReader(export_dir(folder))


@contextmanager
def opened(paths: Iterable[str | Path]) -> Iterator[list[ExportReader]]:
    """Models, open inside the block. Every command about averages takes its models from here.

    Raises:
        FileNotFoundError, SettingsError, ExportError: as ``open_model``.
        SettingsError: more models than the limit of open files allows.
    """
    names = list(paths)
    limit = open_files_each(len(names))
    with ExitStack() as stack:
        readers = [stack.enter_context(closing(open_model(name))) for name in names]
        for reader in readers:
            reader.files.limit = limit
        yield readers


def _open_checkpoint(folder: Path) -> ExportReader:
    """The model that a checkpoint of a run stands for: trained tensors from its slices, frozen ones from the parent.

    The optimizer's moments in the same files are not read; only the checksum of a file covers them.
    """
    # These bring the model along, which exports do without.
    from keye_train.model.configuration import KeyeConfig
    from keye_train.model.trained import TrainedModel

    seals = {folder / name: seal["sha256"] for name, seal in read_json(folder / COMPLETE)["files"].items()}
    if lost := sorted(path.name for path in seals if not path.exists()):
        raise SettingsError(f"{folder} is no whole checkpoint ({lost[0]} is missing): take another one")
    model = TrainedModel(folder, verify=False)
    slices = _slices(folder)
    # What was frozen is the parent's, or, where a run had none, stands in its export once it is finished.
    export = folder.parent.parent / EXPORT
    whole = export if model.settings.parent is None else export_dir(model.settings.parent)
    parent = tensor_places(whole) if whole.is_dir() else {}
    places = {}
    for name, shape in model.shapes.items():
        if name in slices:
            places[name] = TensorPlace(name, CheckpointReader.dtype, shape, slices[name])
        elif name in parent:
            places[name] = parent[name]
        else:
            raise SettingsError(
                f"{folder}: {name} was frozen, so the checkpoint lacks it, neither parent nor export of the run has "
                f"it. Write the whole model first: keye-convert export {folder} FOLDER, and name that folder"
            )
    beside = tempfile.TemporaryDirectory(prefix="keye-merge-")
    fields = KeyeConfig(**model.config.to_dict()).to_diff_dict()
    dtype = str(model.dtype).removeprefix("torch.")
    write_json_atomic(
        Path(beside.name) / "config.json", {k: v for k, v in fields.items() if k != "dtype"} | {"torch_dtype": dtype}
    )
    documents = [folder / name for name in (INDEX, LAYOUT_MANIFEST)]
    for name, value in model.files().items():
        if name == MANIFEST:
            continue
        if isinstance(value, Path):
            shutil.copyfile(value, Path(beside.name) / name)
            documents.append(value)
        else:
            write_json_atomic(Path(beside.name) / name, value)
    return ExportReader(Path(beside.name), places, model.dtype, folder, documents, seals, beside.cleanup)


def _slices(folder: Path) -> dict[str, tuple[Span, ...]]:
    """Where the weights of each trained parameter lie, in the order of the values."""
    index = read_json(folder / INDEX)
    keys = {place.name: place.spans[0] for file in index["files"] for place in file_places(folder / file)}
    return {
        name: tuple(keys[slice_key(STATE_OF_WEIGHTS, name, start, stop)] for _, start, stop in entry["slices"])
        for name, entry in index["parameters"].items()
    }


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
