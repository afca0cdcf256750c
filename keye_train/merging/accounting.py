"""What becomes of every tensor of the models: merged, copied or dropped. Nothing is left out silently."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from keye_train.merging.compatibility import Difference, MergeError, compare, unequal, value_problems
from keye_train.merging.methods import AVERAGED_DTYPES
from keye_train.merging.reading import ExportReader
from keye_train.merging.shard_file import PlannedTensor
from keye_train.merging.ties import drop_doubles, untie


@dataclass(frozen=True)
class Share:
    """How one tensor of the result comes about."""

    planned: PlannedTensor
    members: tuple[int, ...]  # numbers of the readers whose values go into it; the base's, where it has one, last
    merged: bool  # by the method; else the values of the first member are copied
    must_agree: bool = False  # copied: whether the other members have to hold the same values


@dataclass(frozen=True)
class Accounts:
    """Every tensor of every model."""

    shares: dict[str, Share]  # in the order in which the first model lies on the disk
    allowed: list[Difference]
    dropped: list[str]  # names that the first model lacks, and second copies of a tied matrix
    untied: bool  # the result holds output matrix and embedding, whatever the first model's config says


def account(
    readers: Sequence[ExportReader], has_base: bool, allow: Collection[str], dtype: torch.dtype | None
) -> Accounts:
    """Settle what becomes of every tensor.

    Args:
        readers: the models; the base, where the method has one, last.
        has_base: whether it has.
        allow: names of ``ALLOWED_DIFFERENCES``.
        dtype: of the result's averaged tensors; None: of the models.

    Raises:
        MergeError: the models differ in ways that are not allowed. All are listed, and all values that are not finite.
    """
    doubles = drop_doubles(readers)
    untied = [*doubles, *(untie(readers) if "tied" in allow else [])]
    found = [*untied, *compare(readers)]
    refused = [str(one) for one in found if one.kind not in allow]
    if refused:
        # The values are read as well, so that one run names everything there is to mend.
        shared = [name for name in readers[0].places if _alike(readers, name)]
        raise MergeError(refused + value_problems(readers, shared, equal="integers" not in allow))
    if "integers" in allow:
        found += [one for name in readers[0].places for one in unequal(readers, name)]
    first = readers[0]
    shares = {name: _share(readers, name, has_base, "integers" not in allow, dtype) for name in first.places}
    dropped = sorted({name for reader in readers for name in (*reader.places, *reader.left_out)} - set(first.places))
    return Accounts(shares, found, dropped, bool(untied))


def _share(
    readers: Sequence[ExportReader], name: str, has_base: bool, must_agree: bool, dtype: torch.dtype | None
) -> Share:
    place = readers[0].places[name]
    holders = tuple(i for i, reader in enumerate(readers) if name in reader.places)
    models = holders[:-1] if has_base and holders[-1] == len(readers) - 1 else holders
    averaged = [readers[i].places[name].dtype in AVERAGED_DTYPES for i in holders]
    same_shape = all(readers[i].places[name].shape == place.shape for i in holders)
    if all(averaged) and same_shape and not (has_base and holders == models):
        written = dtype or reduce(torch.promote_types, [readers[i].dtype_of(name) for i in models])
        return Share(PlannedTensor(name, written, place.shape), holders, merged=True)
    if averaged[0]:  # a mean of one: the first model's values
        return Share(PlannedTensor(name, dtype or readers[0].dtype_of(name), place.shape), (0,), merged=True)
    planned = PlannedTensor(name, place.dtype, place.shape)
    if must_agree and same_shape:
        return Share(planned, holders, merged=False, must_agree=True)
    return Share(planned, (0,), merged=False)


def _alike(readers: Sequence[ExportReader], name: str) -> bool:
    first = readers[0].places[name]
    twins = [reader.places.get(name) for reader in readers]
    return all(twin is not None and (twin.dtype, twin.shape) == (first.dtype, first.shape) for twin in twins)
