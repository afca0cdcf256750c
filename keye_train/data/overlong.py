"""Samples that exceed the budgets of a pack by themselves: how they are made to fit, decided from the index alone.

What comes out is a ``Fit``, two numbers that the reader carries out: each image and video takes at most so many tokens,
and the conversation ends behind so many answers. Sizes are worked out by the same rules as the decoder's, so what is
planned is what is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from keye_train.data.packing import Budget
from keye_train.model.media_options import MediaRequest, token_limit
from keye_train.sample import Fit, MediaInfo, MediaKind
from keye_train.settings import DataSettings, Overlong, ResolutionSettings

Cut = tuple[int, int]
"""Text tokens and media of a conversation up to the end of one of its answers."""


@dataclass(frozen=True)
class Fitting:
    """What may be done to the samples of one source."""

    ways: tuple[Overlong, ...]  # in the order in which they are tried
    budget: Budget  # of a pack
    least: float  # see ``data.downscale_least``

    @classmethod
    def from_settings(cls, data: DataSettings, source: str, budget: Budget) -> Fitting | None:
        """The policy of a source; None where its overlong samples are skipped."""
        own = data.sources[source].overlong
        ways = tuple(data.overlong if own is None else own)
        return cls(ways, budget, data.downscale_least) if ways else None


class Fitted(NamedTuple):
    """A sample that fits, and what it then takes."""

    fit: Fit
    tokens: int  # language tokens
    patches: int  # vision patches
    patches_squared: int  # sum over its images and videos


def fit_sample(
    text_tokens: int,
    cuts: Sequence[Cut],
    media: Sequence[MediaInfo],
    resolution: ResolutionSettings,
    fitting: Fitting,
    pair: bool = False,
) -> Fitted | None:
    """Make a sample fit into an empty pack with the least change that the policy allows.

    With ``downscale`` first, as many turns as possible are kept and media pay; with ``truncate`` first, media are
    reduced only where not even the first answer fits otherwise.

    Args:
        text_tokens: of the whole conversation, without the pads of its media.
        cuts: see ``Cut``; of every answer but one that ends the conversation.
        media: in the order in which the conversation mentions them; each has a grid at this resolution.
        resolution: of the recipe.
        fitting: the policy.
        pair: of Stage 0, where an image goes into no sequence: it takes patches and no tokens.

    Returns:
        None where nothing that is allowed makes it fit.
    """
    whole = _tokens(media, resolution)
    ends = [(0, text_tokens, len(media))]
    if Overlong.truncate in fitting.ways:
        ends += [(answers, *cut) for answers, cut in reversed([*enumerate(cuts, 1)])]
    downscale = Overlong.downscale in fitting.ways
    passes = [downscale] if fitting.ways[0] == Overlong.downscale else [False, *([True] if downscale else [])]
    for smaller in passes:
        for answers, text, count in ends:
            left, room = fitting.budget.max_tokens - text, fitting.budget.max_patches // 4
            if not pair:
                room = min(left, room)
            elif left < 0:
                continue
            found: tuple[list[int], int] | None = whole[:count], 0
            if sum(whole[:count]) > room:
                found = _downscaled(media[:count], whole[:count], room, resolution, fitting.least) if smaller else None
            if found is not None:
                tokens, limit = found
                patches = [4 * own for own in tokens]
                squared = sum(own * own for own in patches)
                return Fitted(Fit(answers, limit), text + (0 if pair else sum(tokens)), sum(patches), squared)
    return None


def _downscaled(
    media: Sequence[MediaInfo], tokens: Sequence[int], room: int, resolution: ResolutionSettings, least: float
) -> tuple[list[int], int] | None:
    """Tokens of media that together have room, and the limit on each that leads to them; None: they would be too small.

    The largest pay first, down to one common level, so that small pictures beside a large one stay as they are.
    """
    limit = _level(tokens, room)
    lowest = max((_lowest(*own, resolution, least) for own in zip(media, tokens, strict=True)), default=1)
    # Below a limit, sizes are whole rows and columns; a video with fewer frames may have larger ones. No medium is
    # above the limit in any case, so the loop ends at room / media at the latest.
    while limit >= lowest:
        found = _tokens(media, resolution, limit)
        if sum(found) <= room:
            return found, limit
        limit -= max(1, (sum(found) - room) // len(media))
    return None


def _tokens(media: Sequence[MediaInfo], resolution: ResolutionSettings, limit: int = 0) -> list[int]:
    return [MediaRequest.of(medium, resolution, token_limit(medium.kind, limit, resolution)).tokens for medium in media]


def _level(tokens: Sequence[int], room: int) -> int:
    """Largest number such that the tokens, each cut down to it, have room together."""
    left = room
    for place, own in enumerate(sorted(tokens)):
        share = left // (len(tokens) - place)
        if own > share:
            return share
        left -= own
    return max(tokens, default=0)


def _lowest(medium: MediaInfo, tokens: int, resolution: ResolutionSettings, least: float) -> int:
    """Lowest limit that an image or video of so many tokens is put to."""
    smallest = resolution.image_min_tokens
    if medium.kind == MediaKind.video:
        smallest = resolution.video_min_frames * resolution.video_frame_min_tokens
    return max(min(tokens, smallest), math.ceil(least * tokens), 1)
