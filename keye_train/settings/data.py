"""The data: sources, mixtures, resolution and readers."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import Any

from keye_train.settings.basics import SettingsError, mixture_tables


class VideoBackend(str, Enum):
    """What decodes videos. Both take the same frames; their pixels differ by rounding."""

    pyav = "pyav"
    """PyAV, which brings its own FFmpeg."""
    torchcodec = "torchcodec"
    """torchcodec, which needs the shared libraries of an FFmpeg on every machine that reads data."""
    auto = "auto"
    """torchcodec where it can be loaded, else PyAV: pixels then depend on the machine in their last bits."""


@dataclass
class ResolutionSettings:
    """How many tokens an image or a video may take. The size of any media follows from these without decoding it.

    The values here are those of the first report of Keye-VL (2.2) and its released code; ``recipes/resolution`` has
    those of both reports.
    """

    image_min_tokens: int = 4
    image_max_tokens: int = 16384
    video_frame_min_tokens: int = 128
    """Of one frame; gives way where a video of ``video_min_frames`` would not fit into ``video_max_tokens``."""
    video_frame_max_tokens: int = 768
    video_max_tokens: int = 24576
    """Of all frames of one video."""
    video_fps: float = 2.0
    """Frames taken from each second of a video, as far as the limits below allow."""
    video_min_frames: int = 4
    video_max_frames: int = 768


class Overlong(str, Enum):
    """What may be done to a sample that exceeds ``stage.max_tokens`` or ``stage.max_patches`` by itself."""

    downscale = "downscale"
    """Images get fewer pixels, videos fewer pixels a frame and then fewer frames, by the rules of ``resolution`` with a
    lower limit; the largest first, down to ``downscale_least`` and to the smallest sizes that ``resolution`` names."""
    truncate = "truncate"
    """The conversation ends behind the last answer with which it fits; media of later turns go with them."""


@dataclass
class StorageSettings:
    """Where shards may come from, and how they are fetched. None of it changes what a step reads."""

    allow_network: bool = False
    """Whether shards may be read from URLs (s3://, gs://, hf://, https://, ...). Credentials and endpoints come from
    the environment and the configuration of fsspec, never from a recipe."""
    index_dir: str | None = None
    """Local folder for the indexes; null: each index stands beside its shard."""
    cache_dir: str | None = None
    """Folder on a disk of this node for whole copies of remote shards, shared by all its processes; null: samples are
    fetched by their byte ranges whenever they are read."""
    cache_bytes: int = 200_000_000_000
    """Size of ``cache_dir``; the copies that were used longest ago make room."""
    merge_gap_bytes: int = 65_536
    """Samples of a pack that lie at most this far apart in a shard are fetched with one read."""
    connections: int = 8
    """Reads of remote shards, and of indexes that are not at hand, that one process has under way at once."""
    attempts: int = 6
    """How often a read is tried before a fault of the storage stops the run."""
    backoff_s: float = 0.5
    """Longest wait before the second attempt; it doubles with every further one, and the wait is drawn below it."""


@dataclass
class SourceSettings:
    """One named set of shards."""

    shards: list[str]
    """WebDataset .tar files, each with its index (``keye-data index``): paths or URLs, with ``*``, ``?``, ``[...]``,
    ``{a,b}`` and ``{000..123}``; or a folder prepared for megatron-energon, which stands for its split ``train``."""
    max_skipped_fraction: float | None = None
    """The run stops when more than this share of this source's samples could not be read; None: only
    ``data.max_skipped_fraction`` of all sources together counts."""
    filter: str | None = None
    """Which samples are drawn, e.g. ``text_tokens >= 8 and (images == 1 or duration < 60) and task != "chart"``.
    Columns and operators stand in ``keye_train.data.filters``. The others are passed over, as if not there."""
    overlong: list[Overlong] | None = None
    """What is done to samples of this source that are over a budget of a pack; null: as ``data.overlong`` says."""
    max_epochs: int | None = None
    """How often the rows are drawn at most; then the source leaves the mixture and the others go on by their weights.
    1: every row once. null: without end."""


class MixtureUnit(str, Enum):
    """What the weights of a mixture are shares of."""

    samples = "samples"
    """Every prefix of the draw holds each source within one sample of its share."""
    tokens = "tokens"
    """Language tokens, media included; within about the largest sample. Samples that cannot be read, or are over the
    budget, count 0."""
    compute = "compute"
    """FLOPs of both towers as ``model.flops`` counts them; within about the dearest sample."""


@dataclass
class CurriculumPoint:
    """From where on a mixture has other weights."""

    at: float
    """Fraction of ``over``, above 0."""
    mixture: str
    """Name of the mixture whose weights hold there."""


@dataclass
class CurriculumSettings:
    """How the weights of a mixture change with what has been drawn. At the start they are its own."""

    points: list[CurriculumPoint]
    over: float | None = None
    """What is drawn up to ``at: 1``, in samples, tokens or FLOPs as ``mixture_unit`` says. null, for tokens only: what
    the packs of the stage hold (steps x global_batch_packs x max_tokens)."""
    linear: bool = True
    """Shares run in straight lines from point to point; false: they stay until the next point."""


@dataclass
class ZeroshotSettings:
    """One classification task for Stage 0's towers, which have never been trained on its classes as such."""

    shards: list[str]
    """Samples with one image each, as in ``heldout_pairs``."""
    label: str
    """Where a sample's JSON holds its class: keys joined by dots; lists on the way are walked through. A sample with
    several different values there, or with one that is no class, is not part of the task."""
    classes: dict[str, list[str]]
    """Value under ``label`` -> words for it."""
    prompts: list[str]
    """Captions with {} in the place of the word. A class is the mean over all its words and prompts."""


@dataclass
class DataSettings:
    """Sources, how they are mixed, and how they are read."""

    name: str
    root: str
    """Folder of the data; the paths below are written as ``${data.root}/...``, so one override moves them all."""
    sources: dict[str, SourceSettings]
    mixtures: dict[str, Any]
    """Name of a mixture -> source -> weight. Weights are shares of ``mixture_unit``; they need not sum to 1."""
    mixture_unit: MixtureUnit = MixtureUnit.samples
    curricula: dict[str, CurriculumSettings] = field(default_factory=dict)
    """Name of a mixture -> how its weights change."""
    heldout: dict[str, SourceSettings] = field(default_factory=dict)
    """Task -> shards that no stage trains on; ``keye-eval`` generates on them."""
    heldout_pairs: SourceSettings | None = None
    """Image-caption pairs for the retrieval score of Stage 0."""
    zeroshot: dict[str, ZeroshotSettings] = field(default_factory=dict)
    """Task -> images, classes and prompts for the zero-shot score of Stage 0."""
    resolution: ResolutionSettings = field(default_factory=ResolutionSettings)
    storage: StorageSettings = field(default_factory=StorageSettings)
    video_backend: VideoBackend = VideoBackend.pyav
    overlong: list[Overlong] = field(default_factory=list)
    """What is done to samples over a budget of a pack, in the order in which it is tried: ``[downscale]``,
    ``[truncate]``, ``[downscale, truncate]`` (keeps turns, reduces media), ``[truncate, downscale]`` (keeps media,
    reduces them where not even the first answer fits). What still does not fit is skipped, with a line in the ledger,
    and so is every such sample with ``[]``. The text of Stage 0 always fits, so its pairs can only be downscaled."""
    downscale_least: float = 0.25
    """Share of its tokens that every image and video keeps where ``overlong`` has downscale."""
    window_samples: int = 65536
    """Samples drawn, as metadata only, before they are packed together; a few more fill the last global batch."""
    balance_packs: int | None = None
    """Packs of like cost that a global batch is made of: the number of ranks, for which no rank then waits for another;
    nor does it at a divisor of that number. A divisor of ``stage.global_batch_packs``; null: a quarter of it. Where it
    is more than a quarter, batches are less alike in their sources. The samples of a step follow from this number,
    never from the actual number of ranks."""
    cost_file: str | None = None
    """File of ``keye-data fit-cost``: packs are balanced by times that were measured in a run of the same model on the
    same kind of device. null: by the operations that the model's config counts."""
    shuffle_block_rows: int = 128
    """Neighbouring rows that stay together in sources larger than a group; see ``keye_train.data.blocks``."""
    shuffle_group_blocks: int = 8192
    """Blocks, from all parts of a source, whose rows are shuffled together. More mix better, make a window read from
    more shards, and take memory: 26 bytes for each row of a group. Windows are about as alike as those of a full
    shuffle where this is a quarter of the samples that a window draws from a source, or as many as its shards. Sources
    of at most shuffle_block_rows * shuffle_group_blocks rows are shuffled row by row."""
    plan_cache: str | None = None
    """Folder, best on a disk of the machine, that keeps the headers of shards for all processes and later starts, and
    the measured sizes of those whose index is remote or has no SHARD.tar.sizes (23 bytes a sample of the shards looked
    at). null: each process reads and measures for itself. May be deleted at any time between runs."""
    workers: int = 2
    """Reader processes for each rank; 0 reads in the training process."""
    prefetch_steps: int = 2
    """Steps that the readers work ahead."""
    quarantine: list[str] = field(default_factory=list)
    """Files that ``keye-data ledger --quarantine`` wrote: their samples are left out, whichever source they are in."""
    scaled_jpeg: bool = False
    """Decode a JPEG at a half, a quarter or an eighth of its sides where the recipe needs at most half of those:
    2 to 5 times as fast for photographs far above the resolution; levels change by 0.5 in the mean, 10 at most."""
    decode_seconds: float = 300.0
    """CPU time that one sample may take to decode, else it is skipped; by the clock, five times that. Reader processes
    only: with ``workers: 0`` nothing can end a decoder that hangs."""
    decode_bytes: int = 4 * 2**30
    """Memory that one sample may take to decode, else it is skipped. Reader processes on Linux only."""
    max_skipped_fraction: float = 0.05
    """The run stops when more than this share of the samples, over all ranks, could not be read."""

    def __post_init__(self) -> None:
        self.mixtures = mixture_tables("data.mixtures", self.mixtures)


def check_resolution(resolution: ResolutionSettings) -> None:
    """Raise SettingsError for values that cannot work together."""
    pairs = (
        ("image_min_tokens", "image_max_tokens"),
        ("video_frame_min_tokens", "video_frame_max_tokens"),
        ("video_frame_min_tokens", "video_max_tokens"),
        ("video_min_frames", "video_max_frames"),
    )
    for low, high in pairs:
        if not 0 < getattr(resolution, low) <= getattr(resolution, high):
            raise SettingsError(f"data.resolution.{low} must be above 0 and at most data.resolution.{high}")
    if resolution.video_fps <= 0:
        raise SettingsError("data.resolution.video_fps must be above 0")


def check_data(data: DataSettings) -> None:
    """Raise SettingsError for values that cannot work together."""
    for mixture, weights in data.mixtures.items():
        for source in weights:
            if source not in data.sources:
                raise SettingsError(
                    f"data.mixtures.{mixture} names the source '{source}', which data.sources does not have; "
                    f"sources: {sorted(data.sources)}"
                )
        if not any(weight > 0 for weight in weights.values()):
            raise SettingsError(f"data.mixtures.{mixture} has no source with a weight above 0")
    _check_draw(data)
    for name, task in data.zeroshot.items():
        if len(task.classes) < 2 or not all(task.classes.values()) or not task.prompts:
            raise SettingsError(f"data.zeroshot.{name} needs at least two classes, a word for each, and a prompt")
        for prompt in task.prompts:
            if prompt.count("{}") != 1 or prompt.count("{") != 1 or prompt.count("}") != 1:
                raise SettingsError(f"data.zeroshot.{name}.prompts: '{prompt}' needs {{}} once, where the word goes")
    check_resolution(data.resolution)
    _check_overlong(data)
    if data.balance_packs is not None and data.balance_packs < 1:
        raise SettingsError(f"data.balance_packs={data.balance_packs} must be at least 1, or null")
    if data.window_samples < 1 or data.prefetch_steps < 1 or data.workers < 0:
        raise SettingsError("data.window_samples and data.prefetch_steps are at least 1, data.workers at least 0")
    fractions = {f"sources.{name}.": one.max_skipped_fraction for name, one in data.sources.items()}
    for where, fraction in {"": data.max_skipped_fraction, **fractions}.items():
        if fraction is not None and not 0 <= fraction <= 1:
            raise SettingsError(f"data.{where}max_skipped_fraction={fraction} must lie between 0 and 1")
    if not data.decode_seconds > 0 or data.decode_bytes < 2**20:
        raise SettingsError("data.decode_seconds must be above 0 and data.decode_bytes at least 1048576 (1 MiB)")
    storage = data.storage
    if storage.attempts < 1 or storage.connections < 1:
        raise SettingsError("data.storage.attempts and data.storage.connections are at least 1")
    if storage.merge_gap_bytes < 0 or storage.cache_bytes < 0 or storage.backoff_s < 0:
        raise SettingsError("data.storage: merge_gap_bytes, cache_bytes and backoff_s are at least 0")
    for name in ("index_dir", "cache_dir"):
        if "://" in (getattr(storage, name) or ""):
            raise SettingsError(f"data.storage.{name}={getattr(storage, name)} has to be a local folder")


def _check_overlong(data: DataSettings) -> None:
    lists = {f"data.sources.{name}.overlong": source.overlong for name, source in data.sources.items()}
    for setting, ways in {"data.overlong": data.overlong, **lists}.items():
        if ways is not None and len(set(ways)) != len(ways):
            raise SettingsError(f"{setting}={[way.value for way in ways]} names one of them twice")
    if not 0 < data.downscale_least <= 1:
        raise SettingsError(f"data.downscale_least={data.downscale_least} is a share: above 0, at most 1")


def _check_draw(data: DataSettings) -> None:
    for name, source in data.sources.items():
        if source.max_epochs is not None and source.max_epochs < 1:
            raise SettingsError(f"data.sources.{name}.max_epochs={source.max_epochs}: at least 1, or null for no end")
    read_whole = {f"data.heldout.{name}": source for name, source in data.heldout.items()}
    if data.heldout_pairs is not None:
        read_whole["data.heldout_pairs"] = data.heldout_pairs
    for setting, source in read_whole.items():
        if source.filter is not None or source.max_epochs is not None or source.overlong is not None:
            raise SettingsError(
                f"{setting}: filter, max_epochs and overlong are for data.sources; held-out shards are read whole"
            )
    for name, curriculum in data.curricula.items():
        setting = f"data.curricula.{name}"
        for mixture in (name, *(point.mixture for point in curriculum.points)):
            if mixture not in data.mixtures:
                raise SettingsError(
                    f"{setting} names the mixture '{mixture}', which data.mixtures does not have; mixtures: "
                    f"{sorted(data.mixtures)}"
                )
        places = [0.0, *(point.at for point in curriculum.points)]
        if len(places) < 2 or any(left >= right for left, right in pairwise(places)):
            raise SettingsError(f"{setting}.points: at least one point, with 'at' above 0 and ascending")
        if curriculum.over is None and data.mixture_unit != MixtureUnit.tokens:
            raise SettingsError(f"{setting}.over: say how many {data.mixture_unit.value} (compute: FLOPs) are at: 1")
        if curriculum.over is not None and curriculum.over * min(places[1:]) < 1:
            raise SettingsError(f"{setting}.over={curriculum.over} puts its first point below one {data.mixture_unit}")
    if data.shuffle_block_rows < 1 or data.shuffle_group_blocks < 1:
        raise SettingsError("data.shuffle_block_rows and data.shuffle_group_blocks are at least 1")
