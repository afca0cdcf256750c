"""Whole checkpoints from one layout to another, a tensor at a time: what ``keye-convert`` does.

=========  ==========================================  =======================================
start      SigLIP and Qwen3                            Keye, the projector drawn
import     the published Keye-VL, or any in its layout  an export as the trainer writes it
export     an export, or the run folder around it      the published layout
export     a checkpoint of a run                       the export that the run would write there
tower      an export of any stage                      SigLIP
=========  ==========================================  =======================================

No more than one shard is in memory. Every tensor of a source is used, listed as dropped, or stops the conversion; a
tensor that the result should have and no source gives stops it too. Nothing in a source is executed, and files of code
are not copied.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keye_train import runs
from keye_train.model.configuration import KeyeConfig
from keye_train.model.convert_config import (
    keye_from_sources,
    published_files,
    siglip_from_keye,
    siglip_from_towers,
    start_files,
)
from keye_train.model.keye import KeyeForConditionalGeneration
from keye_train.model.parameters import PACKING_TABLE
from keye_train.model.pretrained import first_names, meta_dual_encoder, read_config, save_export
from keye_train.model.processor_files import PREPROCESSOR
from keye_train.model.start import (
    CAPTION_DECODER,
    NEW_IN_KEYE,
    TEXT_TOWER,
    new_weights,
    qwen3_language,
    siglip_towers,
    without_tied_head,
)
from keye_train.model.trained import TrainedModel
from keye_train.model.weight_files import MAX_SHARD_BYTES, ExtraFiles, NamedTensors, read_state, write_folder
from keye_train.settings import ResolutionSettings

logger = logging.getLogger(__name__)

PUBLISHED_REPOSITORY = "Kwai-Keye/Keye-VL-8B-Preview"
RECORD = "conversion.json"
DUAL_ENCODER = ["DualEncoder"]
NO_VISION = (NEW_IN_KEYE, "model.", "lm_head.", CAPTION_DECODER, *TEXT_TOWER)  # what an export may have beside a tower

Shape = tuple[int, ...]


@dataclass
class Conversion:
    """What a conversion did."""

    folder: Path
    tensors: int = 0
    parameters: int = 0
    dropped: list[str] = field(default_factory=list)  # names in the sources, on purpose not used


@dataclass(frozen=True)
class Options:
    """What the commands have in common."""

    dtype: torch.dtype | None = None  # of the result; None: as in the source
    max_shard_bytes: int = MAX_SHARD_BYTES
    overwrite: bool = False  # replace an export that stands in the way


def convert_start(
    siglip: Path,
    qwen3: Path,
    out: Path,
    *,
    tokenizer: Path | None = None,
    seed: int = 0,
    untie: bool = False,
    resolution: ResolutionSettings | None = None,
    options: Options = Options(),
) -> Conversion:
    """Keye before its first training step: SigLIP's tower, Qwen3, and a projector drawn from ``seed``.

    The same weights as the trainer's ``model.start`` with this seed.

    Args:
        siglip: folder of a SiglipModel or SiglipVisionModel; its text tower and logit scale are dropped.
        qwen3: folder of a Qwen3ForCausalLM, tied or not.
        out: folder to write.
        tokenizer: folder of Keye's tokenizer; None: Qwen3's.
        seed: of the projector.
        untie: copy tied embeddings into an output matrix of its own.
        resolution: budgets of the processor; None: those of ``tokenizer``, or of the first report where it has none.
        options: data type, shards.

    Raises:
        FileNotFoundError, ValueError: what is absent or does not fit.
    """
    if tokenizer is None:
        tokenizer = qwen3
        logger.warning("--tokenizer is not given: Qwen3's is copied, without Keye's tokens for points, OCR and clips")
    config = keye_from_sources(siglip, qwen3, tokenizer, untie)
    result = Conversion(out)
    tied = config.tie_word_embeddings
    sources = chain(
        siglip_towers(siglip, with_text=False, dropped=result.dropped),
        qwen3_language(qwen3, tied, dropped=result.dropped),
        new_weights(config, seed),
    )
    state = _checked(sources, layout(config), f"{siglip} and {qwen3}", options.dtype, result)
    origin = {"siglip": str(siglip), "qwen3": str(qwen3), "seed": seed}
    _write(state, config, result, options, "start", origin, start_files(tokenizer, config, resolution))
    return result


def convert_import(source: Path, out: Path, options: Options = Options()) -> Conversion:
    """The published checkpoint, or any in its layout, as an export that stages, merges and evaluation read.

    Raises:
        FileNotFoundError, ValueError: what is absent or does not fit.
    """
    config = _language_config(source)
    result = Conversion(out)
    state = _checked(_weights(source, config, result), layout(config), str(source), options.dtype, result)
    files = published_files(source, config)
    result.dropped += sorted(path.name for path in source.glob("*.py"))
    _write(state, config, result, options, "import", {"source": str(source)}, files)
    return result


def convert_export(
    source: Path,
    out: Path,
    *,
    tokenizer: Path | None = None,
    repository: str | None = PUBLISHED_REPOSITORY,
    options: Options = Options(),
) -> Conversion:
    """An export in the published layout, for the published inference code and whatever else reads Keye-VL.

    Args:
        source: an export, or a run folder with one.
        out: folder to write.
        tokenizer: folder with tokenizer and processor files; None: those of the export.
        repository: where ``auto_map`` sends readers that have no Keye of their own and trust remote code;
            None: no ``auto_map``.
        options: data type, shards.

    Raises:
        FileNotFoundError, ValueError: what is absent or does not fit.
    """
    source = runs.export_dir(source)
    config = _language_config(source)
    result = Conversion(out)
    state = _checked(_weights(source, config, result), layout(config), str(source), options.dtype, result)
    files = published_files(tokenizer or source, config)
    if "tokenizer.json" not in files:
        raise FileNotFoundError(f"{tokenizer or source} has no tokenizer.json: name its folder with --tokenizer")
    if repository is not None:
        code = f"{repository}--modeling_keye.KeyeForConditionalGeneration"
        config.auto_map = {
            "AutoConfig": f"{repository}--configuration_keye.KeyeConfig",
            "AutoModel": code,
            "AutoModelForCausalLM": code,
        }
        processor = files[PREPROCESSOR]
        fields = runs.read_json(processor) if isinstance(processor, Path) else dict(processor)
        fields["auto_map"] = {
            "AutoProcessor": f"{repository}--processing_keye.KeyeProcessor",
            "AutoImageProcessor": f"{repository}--image_processing_keye.SiglipImageProcessor",
        }
        files = {**files, PREPROCESSOR: fields}
    _write(state, config, result, options, "export", {"source": str(source)}, files)
    return result


def convert_checkpoint(source: Path, out: Path, *, average: bool = False, options: Options = Options()) -> Conversion:
    """The export that a run would have written where one of its checkpoints stands, byte for byte.

    Args:
        source: ``RUN/checkpoints/step-N``.
        out: folder to write: the export's files, with a manifest.json that names the checkpoint.
        average: the moving average of the weights.
        options: data type, shards.

    Raises:
        FileNotFoundError, ValueError: what is absent, torn or does not fit.
    """
    model = TrainedModel(source, average)
    result = Conversion(out)
    state = _checked(model.tensors(), model.shapes, str(source), options.dtype, result)
    _check_target(out, options)
    save_export(state, model.config, out, options.max_shard_bytes, model.files())
    return result


def convert_tower(source: Path, out: Path, options: Options = Options()) -> Conversion:
    """The vision tower of an export as SigLIP; with it, from Stage 0, the text tower.

    SigLIP has no rotary positions: a reader that does not add them (spec of the tower: docs/weights.md) gets other
    features than Keye does.

    Raises:
        FileNotFoundError, ValueError: what is absent or does not fit.
    """
    source = runs.export_dir(source)
    config = read_config(source)
    both = config.architectures == DUAL_ENCODER
    result = Conversion(out)

    kept = ("visual.", *TEXT_TOWER) if both else ("visual.",)
    whole = _shapes(meta_dual_encoder(config)) if both else layout(config)
    shapes = {name: shape for name, shape in whole.items() if name.startswith(kept) and name != PACKING_TABLE}

    def tower() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in read_state(source):
            if name == PACKING_TABLE or (name.startswith(NO_VISION) and not name.startswith(kept)):
                result.dropped.append(name)
            else:
                yield name, tensor

    fields = (siglip_from_towers(config) if both else siglip_from_keye(config.vision)).to_dict()
    fields["architectures"] = ["SiglipModel" if both else "SiglipVisionModel"]
    _check_target(out, options)
    record = _record("tower", {"source": str(source)}, result)
    state = _checked(tower(), shapes, str(source), options.dtype, result)
    named = ((name.removeprefix("visual."), tensor) for name, tensor in state)
    write_folder(named, fields, out, options.max_shard_bytes, {RECORD: record})
    return result


def layout(config: KeyeConfig) -> dict[str, Shape]:
    """Names and shapes of all tensors of the published layout; a tied output matrix has none of its own."""
    with torch.device("meta"):
        model = KeyeForConditionalGeneration(config)
    return _shapes(model)


def _shapes(model: nn.Module) -> dict[str, Shape]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _language_config(source: Path) -> KeyeConfig:
    config = read_config(source)
    if config.architectures == DUAL_ENCODER:
        raise ValueError(f"{source} is an export of Stage 0, which has no language model: use keye-convert tower")
    config.architectures = [KeyeForConditionalGeneration.__name__]
    return config


def _weights(source: Path, config: KeyeConfig, result: Conversion) -> NamedTensors:
    state = read_state(source)
    return without_tied_head(state, str(source), result.dropped) if config.tie_word_embeddings else state


def _checked(
    state: NamedTensors, shapes: Mapping[str, Shape], source: str, dtype: torch.dtype | None, result: Conversion
) -> Iterator[tuple[str, Tensor]]:
    """``state`` as it is written: each tensor once, in its shape, none missing, none left over; counted."""
    missing = dict(shapes)
    for name, tensor in state:
        if name not in shapes:
            raise ValueError(f"{source}: {name} {list(tensor.shape)} has no place in the model of its config.json")
        if missing.pop(name, None) is None:
            raise ValueError(f"{source}: {name} is there twice")
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{source}: {name} is {list(tensor.shape)}, but config.json asks for {list(shapes[name])}")
        result.tensors += 1
        result.parameters += tensor.numel()
        yield name, tensor if dtype is None else tensor.to(dtype)
    if missing:
        raise ValueError(
            f"{source}: {first_names(list(missing))} missing: copy the checkpoint again, or take a whole one"
        )


def _write(
    state: NamedTensors,
    config: KeyeConfig,
    result: Conversion,
    options: Options,
    command: str,
    origin: Mapping[str, Any],
    files: ExtraFiles,
) -> None:
    _check_target(result.folder, options)
    record = _record(command, origin, result)
    save_export(state, config, result.folder, options.max_shard_bytes, {**files, RECORD: record})


def _record(command: str, origin: Mapping[str, Any], result: Conversion) -> dict[str, Any]:
    """Where a checkpoint comes from. ``dropped`` fills up while the weights stream; the record is written after."""
    return {"command": f"keye-convert {command}", **origin, "dropped": result.dropped, "versions": runs.versions()}


def _check_target(out: Path, options: Options) -> None:
    """Refuse to replace what is no model, or a model without being told to."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / "config.json").exists():
            raise ValueError(f"{out} is there and holds no model: choose another folder")
        if not options.overwrite:
            raise ValueError(f"{out} holds a model: choose another folder, or say --overwrite")
