"""megatron-energon with our encoder and our layout of a pack, for ``benchmarks.loader``.

What it does by its own design: shards are read in order and shuffled in a buffer, samples are encoded, then packed from
a buffer of encoded samples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.energon import (
    Cooker,
    CrudeWebdataset,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    get_loader,
    get_train_dataset,
    stateless,
)
from megatron.energon.flavors import BaseWebdatasetFactory

from benchmarks.loader import MAX_TOKENS, Measured, measure
from keye_train.data.collate import collate_samples
from keye_train.data.formats import parse_sample
from keye_train.model.packed import PackedInputs
from keye_train.model.sample_encoder import EncodedSample, SampleEncoder
from keye_train.sample import SampleRef
from keye_train.settings import TrainSettings

PACKING_BUFFER, SHUFFLE_BUFFER = 64, 64
DATASET = {"__module__": "megatron.energon", "__class__": CrudeWebdataset.__name__}


@dataclass
class RawSample(Sample):
    """A sample as its members."""

    members: dict[str, bytes]


@dataclass
class Encoded(Sample):
    """One encoded sample."""

    sample: EncodedSample


@dataclass
class Packed(Sample):
    """One pack."""

    inputs: PackedInputs
    samples: int


@stateless
def cook(sample: dict[str, Any]) -> RawSample:
    """The members of a crude sample, undecoded."""
    members = {name: data for name, data in sample.items() if not name.startswith("__")}
    return RawSample(**basic_sample_keys(sample), members=members)


class Encoder(DefaultTaskEncoder):
    """Encodes samples and packs them."""

    cookers = (Cooker(cook),)
    decoder = None  # bytes go to our own decoder

    def __init__(self, encoder: SampleEncoder) -> None:
        super().__init__()
        self._encoder = encoder

    @stateless
    def encode_sample(self, sample: RawSample) -> Encoded:
        """Tensors of a sample."""
        parsed = parse_sample(SampleRef("images", "", sample.__key__), sample.members)
        keys = {name: getattr(sample, name) for name in Sample.__dataclass_fields__ if hasattr(sample, name)}
        return Encoded(**keys, sample=self._encoder.encode(parsed))

    def select_samples_to_pack(self, samples: list[Encoded]) -> list[list[Encoded]]:
        """First fit, longest first."""
        packs: list[tuple[int, list[Encoded]]] = []
        for sample in sorted(samples, key=lambda one: -len(one.sample.input_ids)):
            length = len(sample.sample.input_ids)
            for number, (filled, members) in enumerate(packs):
                if filled + length <= MAX_TOKENS:
                    packs[number] = (filled + length, [*members, sample])
                    break
            else:
                packs.append((length, [sample]))
        return [members for _, members in packs]

    @stateless
    def pack_selected_samples(self, samples: list[Encoded]) -> Packed:
        """Tensors of a pack."""
        first = samples[0]
        keys = {name: getattr(first, name) for name in Sample.__dataclass_fields__ if hasattr(first, name)}
        inputs = collate_samples([sample.sample for sample in samples], self._encoder.model)
        return Packed(**keys, inputs=inputs, samples=len(samples))


def prepare(folder: Path) -> None:
    """Make ``folder`` a dataset of energon; its ``.tar.idx`` files are the same as ours."""
    shards = sorted(path.name for path in folder.glob("*.tar"))
    BaseWebdatasetFactory.prepare_dataset(folder, shards, split_parts_ratio=[("train", 1.0)], workers=1)
    (folder / ".nv-meta" / "dataset.yaml").write_text(json.dumps(DATASET))


def energon(settings: TrainSettings, workers: int, seconds: float) -> Measured:
    """Energon's loader with ``workers`` processes."""
    folder = Path(settings.data.sources["images"].shards[0]).parent
    config = WorkerConfig(rank=0, world_size=1, num_workers=workers)
    dataset = get_train_dataset(
        str(folder),
        worker_config=config,
        batch_size=None,
        packing_buffer_size=PACKING_BUFFER,
        shuffle_buffer_size=SHUFFLE_BUFFER,
        max_samples_per_sequence=None,
        task_encoder=Encoder(SampleEncoder.from_settings(settings.model, settings.data.resolution)),
    )
    loader = iter(get_loader(dataset))

    def counts() -> Iterator[int]:
        for pack in loader:
            yield pack.samples

    return measure(counts(), seconds)
