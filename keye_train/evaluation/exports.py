"""Exports as the evaluation needs them: which kind of model, its processor, and a fingerprint of all it consists of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from keye_train.checkpoints.layout import COMPLETE
from keye_train.evaluation.fingerprints import FileHashes, model_fingerprint
from keye_train.model.configuration import SPECIAL_TOKENS, KeyeConfig
from keye_train.model.sample_encoder import SampleEncoder
from keye_train.runs import EXPORT, export_dir, file_sha256, read_json
from keye_train.settings import (
    LanguageModelSettings,
    ModelSettings,
    ResolutionSettings,
    SpecialTokenSettings,
    TextTowerSettings,
    VideoBackend,
)


@dataclass(frozen=True)
class Export:
    """A model on disk."""

    name: str  # in the table
    folder: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, name: str, path: str) -> Export:
        """The export that ``path``, a run folder or an export, stands for.

        Raises:
            FileNotFoundError: it is not there.
        """
        folder = export_dir(path)
        return cls(name, folder, read_json(folder / "config.json"))

    @property
    def is_dual_encoder(self) -> bool:
        """An export of Stage 0: two towers, no language model."""
        return self.config.get("architectures") == ["DualEncoder"]

    def settings(self) -> ModelSettings:
        """The settings that processor and collation read: tokenizer, special tokens, vocabularies, caption length."""
        config = self.config
        tokens = {name: config[token.field] for name, token in SPECIAL_TOKENS.items() if token.field}
        tokens["pad"] = tokens["bos"]  # Keye pads with <|endoftext|>, which is its bos token as well
        text = config.get("text_tower") or {"vocab_size": config["vocab_size"]}
        return ModelSettings(
            name=self.name,
            tokenizer=str(self.folder),
            language=LanguageModelSettings(vocab_size=config["vocab_size"]),
            special_tokens=SpecialTokenSettings(**tokens),
            text_tower=TextTowerSettings(**text),
        )

    def processor(self, resolution: ResolutionSettings, video_backend: VideoBackend) -> SampleEncoder:
        """The processor with the export's own tokenizer.

        Raises:
            SettingsError: no tokenizer in the export, or one that disagrees with its config.json.
        """
        return SampleEncoder.from_settings(self.settings(), resolution, video_backend)

    def encoding_key(self) -> str:
        """Equal for exports that turn the same sample into the same tensors."""
        settings = self.settings()
        return repr((file_sha256(self.folder / "tokenizer.json"), settings.special_tokens, settings.text_tower))

    def fingerprint(self, hashes: FileHashes, weights: Sequence[Path] | None = None) -> str:
        """SHA-256 over weights, configuration and tokenizer. Reads weights that ``hashes`` does not know.

        Args:
            weights: files of the weights; None: the safetensors in the folder.
        """
        documents = [self.folder / "config.json", self.folder / "tokenizer.json"]
        return model_fingerprint(documents, weights or list(self.folder.glob("*.safetensors")), hashes)

    def lacking(self) -> list[str]:
        """What keeps a model from answering held-out samples; empty where nothing does."""
        kind = self.config.get("model_type", KeyeConfig.model_type)
        if kind != KeyeConfig.model_type:
            return [f"it is a model of the type {kind}, not Keye"]
        if self.is_dual_encoder:
            return ["it is an export of Stage 0, which has no language model"]
        lacking = [name for name in ("tokenizer.json", "tokenizer_config.json") if not (self.folder / name).exists()]
        fields = ["vocab_size", *(token.field for token in SPECIAL_TOKENS.values() if token.field)]
        return [f"it has no {name}" for name in lacking] + [
            f"its config.json has no {field}" for field in fields if field not in self.config
        ]


@contextmanager
def opened_exports(named: Mapping[str, str], out: Path) -> Iterator[dict[str, Export]]:
    """What the user names as a model -> its export. A checkpoint of a run becomes the export that the run would have
    written there, below ``out`` as long as the block lasts.

    Args:
        named: name in the tables -> run folder, export or ``RUN/checkpoints/step-N``.
        out: folder with room for those exports.

    Raises:
        FileNotFoundError, ValueError: a model is absent; a checkpoint is torn or does not fit its run.
    """
    with ExitStack() as stack:
        exports = {}
        for name, path in named.items():
            if (Path(path) / COMPLETE).exists():
                from keye_train.model.convert import convert_checkpoint  # brings all models along

                out.mkdir(parents=True, exist_ok=True)
                aside = stack.enter_context(TemporaryDirectory(prefix=".export-", dir=out))
                exports[path] = Export.open(name, str(convert_checkpoint(Path(path), Path(aside) / EXPORT).folder))
            else:
                exports[path] = Export.open(name, path)
        yield exports


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype() -> torch.dtype | None:
    """float32 on the CPU, where bfloat16 is slower and less exact; elsewhere that of the export (None)."""
    return torch.float32 if device().type == "cpu" else None
