"""Reading for ``keye-data view``: as the training reads, under the same limits, in a process that may be lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from keye_train.data.collate import LoadedPack
from keye_train.data.formats import parse_sample
from keye_train.data.limits import DecodeLimits, Watch, unwatched
from keye_train.data.loader import PackReader, ReadTask
from keye_train.data.memory import slot_bytes
from keye_train.data.pool import ReaderPool
from keye_train.data.reader import ShardReader
from keye_train.model.chat import first_answers, media_slots
from keye_train.model.media_options import MediaRequest, token_limit
from keye_train.model.sample_encoder import EncodedPair, EncodedSample, SampleEncoder
from keye_train.model.video import frames_taken, open_video
from keye_train.sample import MediaKind, SampleError, SampleRef
from keye_train.settings import Objective, TrainSettings


@dataclass(frozen=True)
class ReadMedium:
    """An image or video of a sample that was read."""

    name: str  # member of the sample
    kind: MediaKind
    times_s: list[float]  # of the frames of a video that are taken, behind its first


@dataclass(frozen=True)
class ReadSample:
    """One sample as far as it could be read."""

    key: str = ""
    task: str = ""
    encoded: EncodedSample | EncodedPair | None = None
    media: tuple[ReadMedium, ...] = ()
    problem: str = ""  # why it could not be read


class ViewReader:
    """Reads single samples and whole packs. Goes into a reader process."""

    def __init__(self, settings: TrainSettings, encoder: SampleEncoder) -> None:
        stage = settings.stage
        self._settings, self._encoder = settings, encoder
        self._shards = ShardReader(settings.data.storage)
        self._packs = PackReader(
            encoder, stage.objective, stage.max_tokens, stage.caption_weight > 0, settings.data.storage
        )

    def __call__(
        self,
        task: ReadTask | tuple[ReadTask, ...],
        given_up: Mapping[int, str] | None = None,
        watch: Watch = unwatched,
        memory: np.ndarray | None = None,
    ) -> ReadSample | LoadedPack:
        """Read a sample, or the samples of a pack; see ``PackReader``."""
        if isinstance(task, tuple):
            return self._packs(task, given_up, watch, memory)
        key, name = "", ""
        try:
            key, members = self._shards.read(task.shard, task.row)
            if given_up:
                raise SampleError(given_up[0])
            with watch(0):
                sample = parse_sample(SampleRef(task.source, task.shard, key), members)
                name = sample.task
                pairs = self._settings.stage.objective == Objective.contrastive
                encoded = (self._encoder.encode_pair if pairs else self._encoder.encode)(sample, task.fit)
                media = [
                    ReadMedium(slot.name, slot.kind, self._times(sample.media[slot.name], slot.kind, task))
                    for slot in media_slots(first_answers(sample.messages, task.fit.answers))
                ]
            return ReadSample(key, name, encoded, tuple(media))
        except SampleError as error:
            return ReadSample(key, name, problem=str(error))

    def _times(self, data: bytes, kind: MediaKind, task: ReadTask) -> list[float]:
        if kind != MediaKind.video:
            return []
        resolution = self._settings.data.resolution
        with open_video(data) as video:
            request = MediaRequest.of(video.info, resolution, token_limit(kind, task.fit.media_tokens, resolution))
            return [video.seconds[index] for index in frames_taken(video.seconds, request)]


class GuardedReader:
    """A ``ViewReader`` in a process of its own, held to ``data.decode_seconds`` and ``data.decode_bytes``.

    With ``data.workers: 0`` it reads in this process, without limits, as the training does.
    """

    def __init__(self, settings: TrainSettings, encoder: SampleEncoder) -> None:
        self._read = ViewReader(settings, encoder)
        limits = DecodeLimits(settings.data.decode_seconds, settings.data.decode_bytes)
        self._pool = ReaderPool(self._read, 1, limits, slot_bytes(settings.stage)) if settings.data.workers else None

    def sample(self, task: ReadTask) -> ReadSample:
        """One sample; what is wrong with it stands in it."""
        read = self._read(task) if self._pool is None else self._pool.submit(task).result()
        assert isinstance(read, ReadSample)
        return read

    def pack(self, tasks: tuple[ReadTask, ...]) -> LoadedPack:
        """One pack; raises what ``PackReader`` raises."""
        read = self._read(tasks) if self._pool is None else self._pool.submit(tasks).result()
        assert isinstance(read, LoadedPack)
        return read

    def close(self) -> None:
        """End the process."""
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> GuardedReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
