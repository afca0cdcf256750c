"""Promise: packs cross from readers without a copy of their pixels, and none is overwritten while it is in use."""

from __future__ import annotations

import gc
import multiprocessing
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from test_loader import Sources, assert_same, make_loader, read_all
from toy_shards import toy_settings

from keye_train.data.memory import PackMemory, slot_bytes
from keye_train.data.transport import Receiver, Sender
from keye_train.model.positions import PATCH_BYTES

SIZE = 4096


@dataclass(frozen=True)
class Value:
    pixels: torch.Tensor
    ids: torch.Tensor
    name: str


def sender_and_receiver() -> tuple[Sender, Receiver]:
    ours, theirs = multiprocessing.get_context("spawn").Pipe(duplex=True)
    return Sender(theirs, SIZE), Receiver(ours)


def send(sender: Sender, receiver: Receiver, fill: int, ids: int = 10) -> tuple[int, Value]:
    """Number of the slot, and what arrives of a value whose pixels were made in it."""
    number, slot = sender.slot(receiver.freed())
    slot[:1000] = fill
    sender.send(Value(torch.from_numpy(slot[:1000]), torch.arange(fill, fill + ids), str(fill)), number)
    return number, receiver.receive()


def test_a_slot_comes_back_when_the_last_tensor_on_it_is_gone_and_not_before() -> None:
    sender, receiver = sender_and_receiver()
    first_slot, first = send(sender, receiver, 1)
    second_slot, second = send(sender, receiver, 2)
    assert first_slot != second_slot
    part = first.pixels.view(10, 100)[3]
    del first
    third_slot, third = send(sender, receiver, 3)
    assert third_slot not in (first_slot, second_slot), "a view of the first is still in use"
    assert (part == 1).all()
    assert second.pixels.tolist() == [2] * 1000
    assert second.ids.tolist() == list(range(2, 12))
    assert second.name == "2"
    del part
    assert send(sender, receiver, 4)[0] == first_slot
    assert (third.pixels == 3).all()


def open_memory() -> int:
    """Descriptors of this process that stand for shared memory; other files are opened and closed by others."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the list itself
            found += "memfd:keye-pack" in str(link.readlink())
    return found


def test_pixels_are_shared_with_the_reader_and_descriptors_are_not_kept() -> None:
    sender, receiver = sender_and_receiver()
    gc.collect()  # what earlier tests have left is not closed in between
    before = open_memory()
    number, slot = sender.slot([])
    slot[:8] = 5
    sender.send(Value(torch.from_numpy(slot[:8]), torch.arange(3), ""), number)
    arrived = receiver.receive()
    assert open_memory() == before
    slot[0] = 6
    assert arrived.pixels.tolist() == [6, *[5] * 7]


def test_tensors_that_find_no_room_in_the_slot_arrive_all_the_same() -> None:
    sender, receiver = sender_and_receiver()
    for count in (0, 380, SIZE):
        _, value = send(sender, receiver, 7, count)
        assert value.ids.tolist() == list(range(7, 7 + count))
        assert (value.pixels == 7).all()


def test_memory_of_this_process_goes_round() -> None:
    memory = PackMemory(SIZE)
    one, other = memory.lend(), memory.lend()
    address, pixels = one.ctypes.data, torch.from_numpy(one[:100])
    assert address != other.ctypes.data
    del one
    third = memory.lend()
    assert third.ctypes.data not in (address, other.ctypes.data)
    del pixels
    assert memory.lend().ctypes.data == address


def test_readers_use_their_slots_again_and_again(toy_sources: Sources, tokenizer_dir: Path) -> None:
    """Each pack is dropped before the next is asked for; ``test_loader`` keeps them all."""
    reference = read_all(toy_settings(toy_sources, tokenizer_dir, workers=0, steps=12))
    settings = toy_settings(toy_sources, tokenizer_dir, workers=1, steps=12)
    places = set()
    with make_loader(settings) as loader:
        for expected in reference:
            step = next(loader)
            assert_same(step, expected)
            places |= {pack.inputs.vision.pixel_patches.data_ptr() for pack in step.packs if pack.patches}
            del step
    ahead = (2 + settings.data.prefetch_steps) * settings.stage.global_batch_packs
    assert 0 < len(places) <= ahead < 12 * settings.stage.global_batch_packs


def test_every_pack_fits_its_slot(toy_sources: Sources, tokenizer_dir: Path) -> None:
    settings = toy_settings(toy_sources, tokenizer_dir)
    size = slot_bytes(settings.stage)
    for step in read_all(settings):
        for pack in step.packs:
            tensors = [v for v in vars(pack.inputs).values() if isinstance(v, torch.Tensor)]
            tensors += [v for v in vars(pack.inputs.vision).values() if isinstance(v, torch.Tensor)]
            taken = sum(tensor.nbytes + 64 for tensor in tensors)
            assert pack.patches * PATCH_BYTES < taken <= size
