"""Promise: every planned sample reaches the model unchanged or stands in the ledger, at any number of readers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise
from multiprocessing.connection import wait
from pathlib import Path

import psutil
import pytest
import torch
from toy_shards import Members, mixed_samples, picture, toy_settings

from data_tools.shards import sample_key, write_shard
from keye_train.data.cost import PackCost
from keye_train.data.ledger import Ledger, SkipLimit, read_ledger
from keye_train.data.loader import Loader, StepData
from keye_train.data.paths import index_path
from keye_train.data.plan import Plan, PlanState
from keye_train.data.reader import offsets_path
from keye_train.model.packed import IGNORE_INDEX, ContrastiveInputs, PackedInputs
from keye_train.model.sample_encoder import SampleEncoder
from keye_train.settings import Objective, SettingsError, SourceSettings, TrainSettings

MakeShard = Callable[..., Path]
Sources = dict[str, SourceSettings]


TOY_COST = PackCost(token=50.0, token_squared=1.0, patch=1.0, patch_squared=0.0)


def make_loader(settings: TrainSettings, rank: int = 0, world_size: int = 1, state: PlanState | None = None) -> Loader:
    plan = Plan.from_settings(settings, TOY_COST)
    processor = SampleEncoder.from_settings(settings.model, settings.data.resolution)
    return Loader(plan, processor, rank, world_size, settings, state)


def read_all(settings: TrainSettings, **arguments: object) -> list[StepData]:
    with make_loader(settings, **arguments) as loader:
        return list(loader)


def assert_same(one: object, other: object) -> None:
    """Equal types and values, tensors bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif hasattr(one, "__dataclass_fields__"):
        for field in fields(one):
            assert_same(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def trained(steps: list[StepData]) -> list[list[tuple[str, str]]]:
    """Shard and key of the samples of each step, sorted."""
    return [sorted((ref.shard, ref.key) for pack in step.packs for ref in pack.refs) for step in steps]


def test_any_number_of_readers_gives_the_same_batches(toy_sources: Sources, tokenizer_dir: Path) -> None:
    torch.manual_seed(0)
    generator_before = torch.get_rng_state()
    reference = read_all(toy_settings(toy_sources, tokenizer_dir, workers=0))
    assert [step.step for step in reference] == list(range(6))
    for workers in (1, 2):
        assert_same(read_all(toy_settings(toy_sources, tokenizer_dir, workers=workers)), reference)
    assert torch.equal(torch.get_rng_state(), generator_before)  # reading takes nothing from the training's generator


def test_any_world_size_reads_the_same_samples_in_a_step(toy_sources: Sources, tokenizer_dir: Path) -> None:
    settings = toy_settings(toy_sources, tokenizer_dir)
    alone = trained(read_all(settings))
    for world_size in (2, 4):
        ranks = [trained(read_all(settings, rank=rank, world_size=world_size)) for rank in range(world_size)]
        together = [sorted(sample for part in parts for sample in part) for parts in zip(*ranks, strict=True)]
        assert together == alone
    with pytest.raises(SettingsError, match="does not divide over 3 ranks"):
        make_loader(settings, world_size=3)


def test_resume_equals_uninterrupted(toy_sources: Sources, tokenizer_dir: Path) -> None:
    settings = toy_settings(toy_sources, tokenizer_dir)
    whole = read_all(settings)
    for stop in (1, 4):
        state = PlanState.from_json(whole[stop - 1].plan_state_after.to_json())
        assert_same(read_all(settings, state=state), whole[stop:])


def test_a_pack_holds_its_samples_one_by_one(toy_sources: Sources, tokenizer_dir: Path) -> None:
    settings = toy_settings(toy_sources, tokenizer_dir)
    kinds = set()
    for step in read_all(settings):
        assert len(step.packs) == 4
        for pack in step.packs:
            inputs = pack.inputs
            assert isinstance(inputs, PackedInputs)
            assert pack.tokens == len(inputs.input_ids) <= settings.stage.max_tokens
            assert pack.patches == len(inputs.vision.pixel_patches) <= settings.stage.max_patches
            assert pack.fill == pack.tokens / settings.stage.max_tokens
            assert len(pack.refs) == len(pack.tasks) == len(pack.sources) == len(inputs.cu_seqlens) - 1
            assert set(inputs.loss_samples.tolist()) == set(range(len(pack.refs)))
            for start, end in pairwise(inputs.cu_seqlens.tolist()):
                assert inputs.position_ids[:, start].tolist() == [0, 0, 0]
                assert (inputs.labels[start:end] != IGNORE_INDEX).any()
            kinds.update(pack.tasks)
    assert kinds == {"text", "caption", "vqa"}


def test_pairs(toy_sources: Sources, tokenizer_dir: Path) -> None:
    settings = toy_settings(toy_sources, tokenizer_dir, objective=Objective.contrastive, steps=2, max_tokens=160)
    for step in read_all(settings):
        for pack in step.packs:
            assert isinstance(pack.inputs, ContrastiveInputs)
            assert pack.inputs.text_ids.shape == (len(pack.refs), 16)
            assert len(pack.inputs.vision.grid_thw) == len(pack.refs) <= 10
            assert pack.tokens == 16 * len(pack.refs)
        assert all("not an image-caption pair" in reason for _, reason in step.dropped)


# --------------------------------------------------------------------------------------------------- bad samples


def broken_source(folder: Path, make_shard: MakeShard) -> Sources:
    """Samples whose pictures are cut off behind a sound header: only decoding shows it."""
    samples: list[Members] = mixed_samples(20)
    for number in (5, 9, 13):
        samples[number] = {"jpg": picture(80, 60)[:-1500], "txt": b"a broken picture"}
    samples[2] = {"json": b"{"}
    samples[3] = {"txt": b"long " * 200}
    return {"a": SourceSettings([str(make_shard(folder / "a.tar", samples))])}


def test_each_planned_sample_is_trained_on_or_in_the_ledger(
    tmp_path: Path, make_shard: MakeShard, tokenizer_dir: Path
) -> None:
    settings = toy_settings(broken_source(tmp_path, make_shard), tokenizer_dir, window_samples=20, steps=1000)
    ledger = Ledger(tmp_path / "run", 0)
    steps = []
    with make_loader(settings) as loader:
        for step in loader:
            ledger.record(step)
            steps.append(step)
            if step.step > 5 and step.plan_state_after.batch == 0:  # between two windows, so the sums must agree
                break
    ledger.close()
    rows = read_ledger(tmp_path / "run")
    reasons = {row["key"]: row["reason"] for row in rows}
    assert set(reasons) == {sample_key(number) for number in (2, 3, 5, 9, 13)}
    assert "JSON" in reasons[sample_key(2)]
    assert "over budget" in reasons[sample_key(3)]
    assert all("broken image" in reasons[sample_key(number)] for number in (5, 9, 13))
    state = steps[-1].plan_state_after
    read = {key for step in trained(steps) for _, key in step}
    assert read | set(reasons) == {sample_key(number) for number in range(20)}
    in_packs = sum(len(step) for step in trained(steps))
    assert in_packs + len(rows) + len(Plan.from_settings(settings, TOY_COST).waiting(state)) == sum(state.drawn)


def test_a_pack_without_a_good_sample_still_goes_to_the_model(
    tmp_path: Path, make_shard: MakeShard, tokenizer_dir: Path
) -> None:
    broken = [{"jpg": picture(100, 100, number)[:-4000], "txt": b"x"} for number in range(8)]
    sources = {"a": SourceSettings([str(make_shard(tmp_path / "a.tar", broken))])}
    for objective in Objective:
        settings = toy_settings(sources, tokenizer_dir, objective=objective, steps=1, window_samples=64)
        for pack in read_all(settings)[0].packs:
            assert pack.refs == ()
            assert pack.skipped
            if isinstance(pack.inputs, PackedInputs):
                assert pack.inputs.input_ids.tolist() == [settings.model.special_tokens.pad]
                assert len(pack.inputs.loss_rows) == 0
                assert pack.inputs.vision.pixel_patches.shape == (0, 3, 14, 14)
            else:
                assert pack.inputs.text_ids.shape == (0, 16)


def test_too_many_bad_samples_stop_the_run() -> None:
    data = toy_settings({"a": SourceSettings([]), "b": SourceSettings([])}, Path("none")).data
    data.window_samples = 1000
    limit = SkipLimit(data)
    for step in range(10):  # 40 of a window of 1,000 are marked by the index: fine, though its first step reads but 20
        marked = 40 if step == 0 else 0
        limit.observe(unreadable=marked, read={"a": 20}, broken={"a": 1 if step == 3 else 0}, window=7)
    with pytest.raises(ValueError, match=r"60 of 1000 samples could not be read.*data\.max_skipped_fraction=0\.05"):
        limit.observe(unreadable=20, read={"a": 20}, broken={}, window=7)
    with pytest.raises(ValueError, match=r"10 of 30 samples could not be read"):
        SkipLimit(data).observe(unreadable=0, read={"a": 20}, broken={"a": 10}, window=0)
    data.sources["b"].max_skipped_fraction = 0.2
    limit = SkipLimit(data)
    limit.observe(unreadable=0, read={"a": 1000, "b": 30}, broken={"b": 5}, window=0)
    with pytest.raises(ValueError, match=r"of the source 'b' .*data\.sources\.b\.max_skipped_fraction=0\.2"):
        limit.observe(unreadable=0, read={"a": 1000, "b": 2}, broken={"b": 7}, window=0)


def test_a_resumed_ledger_forgets_the_steps_that_are_done_again(
    tmp_path: Path, make_shard: MakeShard, tokenizer_dir: Path
) -> None:
    settings = toy_settings(broken_source(tmp_path, make_shard), tokenizer_dir, window_samples=20)
    steps = read_all(settings)
    ledger = Ledger(tmp_path / "run", 0)
    for step in steps:
        ledger.record(step)
    ledger.close()
    whole = read_ledger(tmp_path / "run")
    again = Ledger(tmp_path / "run", 0, first_step=3)
    assert [row for row in whole if row["step"] < 3] == read_ledger(tmp_path / "run")
    for step in steps[3:]:
        again.record(step)
    again.close()
    assert read_ledger(tmp_path / "run") == whole


def test_a_shard_that_changed_behind_its_index_stops_the_run(
    tmp_path: Path, make_shard: MakeShard, tokenizer_dir: Path
) -> None:
    """The shard has the size that its index expects, and every sample the same bytes in the tar, but other tokens."""
    shard = make_shard(tmp_path / "a.tar", [{"txt": b"hello"}] * 4)
    size_bytes = shard.stat().st_size
    indexes = {path: path.read_bytes() for path in (index_path(shard), offsets_path(shard))}
    write_shard(shard, [(sample_key(number), {"txt": b"other words"}) for number in range(4)])
    for path, data in indexes.items():
        path.write_bytes(data)
    assert shard.stat().st_size == size_bytes
    settings = toy_settings({"a": SourceSettings([str(shard)])}, tokenizer_dir, window_samples=40)
    with pytest.raises(ValueError, match=r"its index says .*keye-data index .*a\.tar --force"):
        read_all(settings)


# ----------------------------------------------------------------------------------------------------- processes


def readers() -> list[psutil.Process]:
    """Reader processes of this process."""
    return [reader for server in reader_servers() for reader in server.children()]


def reader_servers() -> list[psutil.Process]:
    """What they are forked from; the tracker of shared resources is not one."""
    running = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in running if "forkserver" in " ".join(child.cmdline())]


def test_closing_ends_the_readers_at_once(toy_sources: Sources, tokenizer_dir: Path) -> None:
    loader = make_loader(toy_settings(toy_sources, tokenizer_dir, workers=2, steps=1000))
    next(loader)
    processes = readers()
    assert len(processes) == 2
    assert all(process.num_threads() < 12 for process in processes)
    (server,) = reader_servers()
    # It may be forked: what runs beside its first thread are those of libraries that take care of a fork.
    names = [Path(f"/proc/{server.pid}/task/{thread.id}/comm").read_text().strip() for thread in server.threads()]
    of_openblas = 0 if server.environ().get("OMP_NUM_THREADS") == "1" else len(os.sched_getaffinity(0)) - 1
    assert len([name for name in names if name != "jemalloc_bg_thd"]) <= 1 + of_openblas
    loader.close()
    assert not [process for process in processes if process.is_running()]


def test_closing_closes_the_shards(tmp_path: Path, make_shard: MakeShard, tokenizer_dir: Path) -> None:
    shard = make_shard(tmp_path / "a.tar", mixed_samples(24))  # which no other test has open

    def open_files() -> set[str]:
        return {file.path for file in psutil.Process().open_files() if Path(file.path).is_relative_to(tmp_path)}

    with make_loader(toy_settings({"a": SourceSettings([str(shard)])}, tokenizer_dir, workers=0)) as loader:
        next(loader)
        assert str(shard) in open_files()
    assert not open_files()


def test_readers_do_not_hear_ctrl_c(toy_sources: Sources, tokenizer_dir: Path) -> None:
    with make_loader(toy_settings(toy_sources, tokenizer_dir, workers=1)) as loader:
        first = next(loader)
        for process in readers():
            os.kill(process.pid, signal.SIGINT)
        rest = list(loader)
    assert [step.step for step in [first, *rest]] == list(range(6))
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())  # we still hear it


def test_a_reader_that_dies_stops_the_run(toy_sources: Sources, tokenizer_dir: Path) -> None:
    with make_loader(toy_settings(toy_sources, tokenizer_dir, workers=1, steps=1000)) as loader:
        next(loader)
        for process in readers():
            process.kill()
        with pytest.raises(RuntimeError, match="a reader process died"):
            list(loader)


def test_the_number_of_a_reader_that_is_gone_gets_no_signal(
    toy_sources: Sources, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has waited for it: by now the number may be that of somebody else's process."""
    with make_loader(toy_settings(toy_sources, tokenizer_dir, workers=1)) as loader:
        list(loader)
        (reader,) = readers()
        reader.kill()
        assert loader._pool is not None
        wait([one._process.sentinel for one in loader._pool._processes])  # the server has told us that it is gone
        signalled: list[int] = []
        monkeypatch.setattr(os, "kill", lambda number, _: signalled.append(number))
    assert not signalled


def test_a_folder_for_temporary_files_with_too_long_a_path_is_named(tmp_path: Path) -> None:
    """The server of readers has a socket there, and names of sockets are short."""
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    code = "from keye_train.data import reader_server; reader_server.prepare('json')"
    environment = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert f"TMPDIR={folder}: its path is too long" in done.stderr


def test_a_tokenizer_that_is_not_of_the_index_is_refused_before_reading(
    toy_sources: Sources, foreign_tokenizer_dir: Path
) -> None:
    with pytest.raises(ValueError, match="another tokenizer"):
        Plan.from_settings(toy_settings(toy_sources, foreign_tokenizer_dir), TOY_COST)
