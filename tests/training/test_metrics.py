"""The figures of a step mean what they say, and collecting them never waits for the device."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
import torch
from corpus import ToyCorpus
from torch._subclasses.fake_tensor import FakeTensorMode

from keye_train import runs
from keye_train.data.cost import training_cost
from keye_train.data.loader import Loader
from keye_train.data.plan import Plan
from keye_train.model.configuration import keye_config
from keye_train.model.flops import FlopCoefficients
from keye_train.model.packed import PackedInputs
from keye_train.model.sample_encoder import SampleEncoder
from keye_train.settings import Precision, SettingsError, TrainSettings
from keye_train.training import device, distributed
from keye_train.training.learner import weighted_sum
from keye_train.training.meter import LossMeter
from keye_train.training.tasks import MAX_TASKS, OTHER, TaskNames
from keye_train.training.trainer import train

STAGE = "2_multitask"


def loader(settings: TrainSettings) -> Loader:
    cost = training_cost(settings)
    encoder = SampleEncoder.from_settings(settings.model, settings.data.resolution)
    return Loader(Plan.from_settings(settings, cost), encoder, 0, 1, settings)


@pytest.mark.parametrize("trainable", ["[vision,projector,language]", "[projector]"])
def test_operations_are_those_of_each_sample_and_medium(toy_corpus: ToyCorpus, tmp_path: Path, trainable: str) -> None:
    """MFU counts both towers, attention by segment, the backward as far as the stage needs one."""
    more = ("stage.steps=2", f"stage.trainable={trainable}", "logging.peak_tflops=0.5", "deepspeed.zero_stage=0")
    settings = toy_corpus.settings("1_align", tmp_path, *more, "stage.mixture=multitask")
    assert train(settings) == 0
    coefficients = FlopCoefficients.of(keye_config(settings.model)).for_training(settings.stage.trainable)
    for row, step in zip(runs.read_jsonl(tmp_path / runs.METRICS), loader(settings), strict=True):
        inputs = [pack.inputs for pack in step.packs]
        assert all(isinstance(one, PackedInputs) for one in inputs)
        expected = sum(
            coefficients.pack(
                one.cu_seqlens.diff().numpy(),  # type: ignore[union-attr]
                one.vision.cu_seqlens.diff().numpy(),
                len(one.loss_rows),  # type: ignore[union-attr]
            )
            for one in inputs
        )
        assert row["flops_per_s"] * row["step_s"] == pytest.approx(expected, rel=1e-9)
        assert row["mfu"] == pytest.approx(row["flops_per_s"] / 0.5e12)
        assert row["balance"] == 1.0  # a single rank waits for nobody
        assert 0 <= row["data_wait_share"] <= 1
        assert row["host_memory_bytes"] > 1e8


def test_adding_up_reads_no_value_from_the_device() -> None:
    """On tensors without values reading one raises: what the step does with losses, beside the model."""
    with FakeTensorMode():
        losses = torch.rand(5, requires_grad=True)
        meter = LossMeter(("a", "b"), ("retrieved", "grad_square/vision"), torch.device("cpu"))
        meter.reset(("other", "ocr"))
        meter.add(losses, torch.zeros(2, 5, dtype=torch.int64), {"retrieved": torch.tensor(1.0)})
        meter.include("grad_square/vision", torch.tensor(2.0))
        weighted_sum(losses, 0.5, torch.rand(5)).backward()
    assert losses.grad is not None


class TestTaskNames:
    def test_every_rank_numbers_alike_whatever_it_saw_first(self) -> None:
        world = distributed.start(timeout_minutes=1)
        names = TaskNames()
        assert names.unknown(["ocr", "", "caption"]) == ["caption", "ocr"]
        names.learn(["ocr", "caption"], world)
        names.learn(["ocr", "video"], world)
        assert names.names == [OTHER, "caption", "ocr", "video"]
        assert names.numbers(["video", "", "unheard"]) == [3, 0, 0]

    def test_labels_without_end_become_other(self) -> None:
        world = distributed.start(timeout_minutes=1)
        names = TaskNames()
        for start in range(0, 3 * MAX_TASKS, 60):
            names.learn(names.unknown(f"task {n}" for n in range(start, start + 60)), world)
        assert len(names.names) == MAX_TASKS + 1
        assert names.unknown(["one more"]) == []


class TestPeak:
    def test_by_recipe(self) -> None:
        assert device.peak_flops(torch.device("cpu"), Precision.fp32, 3.0) == 3e12

    def test_by_the_name_of_the_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        names = {"NVIDIA H100 80GB HBM3": (989.4, 66.9), "NVIDIA H100 PCIe": (756, 51), "NVIDIA H20": (148, 44)}
        for name, (half, single) in names.items():
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
            for precision, peak in ((Precision.bf16, half), (Precision.bf16_autocast, half), (Precision.fp32, single)):
                assert device.peak_flops(torch.device("cuda", 0), precision) == peak * 1e12, name

    def test_measured_where_nothing_is_known(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        state = torch.get_rng_state()
        assert 1e8 < device.peak_flops(torch.device("cpu"), Precision.fp32) < 1e14
        assert torch.equal(state, torch.get_rng_state())
        assert "bare matrix product" in caplog.text

    def test_a_busy_machine_does_not_lower_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One undisturbed product is enough, whenever it comes: it counts, and not the mean, the first or the last."""
        monkeypatch.setattr(device, "PAUSE_S", 0)
        monkeypatch.setattr(device, "LIMIT_S", 1000)
        monkeypatch.setattr(device, "MATRIX_SIZES", {"cpu": (64,)})
        threads = torch.get_num_threads()
        n_timings = device.ROUNDS * device.REPEATS * len({1, threads})
        for lucky in range(n_timings):
            timings = [0.4] * n_timings
            timings[lucky] = 0.002
            monkeypatch.setattr(device, "_seconds", lambda _, left=timings: left.pop(0))
            assert device.measured_flops(torch.device("cpu"), torch.float32) == 2 * 64**3 / 0.002
            assert not timings
        assert torch.get_num_threads() == threads

    def test_time_in_which_others_have_the_core_does_not_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        product = torch.mm

        def interrupted(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            time.sleep(0.02)  # as the scheduler would have it
            return product(left, right)

        monkeypatch.setattr(torch, "mm", interrupted)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        began, ran = time.perf_counter(), time.thread_time()
        found = device._seconds(torch.zeros(8, 8))
        ran, took = time.thread_time() - ran, time.perf_counter() - began
        assert 0 <= found <= ran
        assert took >= 0.02

    def test_products_that_take_too_long_are_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """At 10 MFLOP/s the product of 512 x 512 takes 27 s, that of 256 x 256 an eighth of it."""
        monkeypatch.setattr(device, "PAUSE_S", 0)
        monkeypatch.setattr(device, "LIMIT_S", 40)
        sizes = []

        def seconds(matrix: torch.Tensor) -> float:
            sizes.append(len(matrix))
            return 2 * len(matrix) ** 3 / 1e7

        monkeypatch.setattr(device, "_seconds", seconds)
        assert device.measured_flops(torch.device("cpu"), torch.float32) == pytest.approx(1e7)
        assert set(sizes) == {128, 256}
        sizes.clear()
        monkeypatch.setattr(device, "LIMIT_S", 0)
        device.measured_flops(torch.device("cpu"), torch.float32)
        assert sizes == [128]

    def test_nothing_is_refused(self, toy_corpus: ToyCorpus, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match=r"logging\.peak_tflops"):
            toy_corpus.settings(STAGE, tmp_path, "logging.peak_tflops=0")
