"""The demo's corpus: the same bytes however it is built, nothing held out is trained on, every answer is true."""

from __future__ import annotations

import io
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers import AutoTokenizer

from data_tools.demo import assets
from data_tools.demo.assets import MissingAssetError, load_assets, locate
from data_tools.demo.build import HELDOUT_PAIRS, TRAIN_SAMPLES, build_demo, plan_shards
from data_tools.demo.canvas import COLOURS, luminance
from data_tools.demo.captions import CLIPS, PHOTOS
from data_tools.demo.pairs import NUMBERS
from data_tools.demo.tokenizer import MAX_VOCABULARY, SPECIAL_TOKENS, train_tokenizer
from keye_train.data.formats import parse_sample
from keye_train.data.index import read_columns
from keye_train.data.opening import open_header
from keye_train.data.reader import walk_shard
from keye_train.sample import Sample, SampleRef

SCALE = 0.02


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus, built in this process."""
    out = tmp_path_factory.mktemp("demo") / "one"
    build_demo(out, scale=SCALE, seed=0, workers=1)
    return out


@pytest.fixture(scope="session")
def samples(corpus: Path) -> dict[str, list[Sample]]:
    """ "split/task" -> samples."""
    found: dict[str, list[Sample]] = defaultdict(list)
    for shard in sorted(corpus.glob("*/*.tar")):
        for raw in walk_shard(shard):
            assert raw.error is None
            sample = parse_sample(SampleRef("", str(shard), raw.key), raw.members)
            found[f"{shard.parent.name}/{sample.task}"].append(sample)
    return found


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def picture(data: bytes) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def question(sample: Sample) -> str:
    return sample.messages[0]["content"][-1]["text"]


def records(value: Any, key: str) -> list[Any]:
    """All values under ``key`` anywhere in a record."""
    if isinstance(value, dict):
        own = [value[key]] if key in value else []
        return own + [found for inner in value.values() for found in records(inner, key)]
    return [found for inner in value for found in records(inner, key)] if isinstance(value, list) else []


class TestSameBytes:
    def test_two_processes_write_what_one_writes(self, corpus: Path, tmp_path: Path) -> None:
        build_demo(tmp_path / "two", scale=SCALE, seed=0, workers=2)
        assert bytes_below(tmp_path / "two") == bytes_below(corpus)

    def test_an_interrupted_build_is_completed(self, corpus: Path, tmp_path: Path) -> None:
        whole = bytes_below(corpus)
        kept = {
            name: data for name, data in whole.items() if not re.search(r"manifest|shape|tokenizer|\.idx|index", name)
        }
        out = tmp_path / "rest"
        for name, data in kept.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(data)
        untouched = {name: (out / name).stat().st_mtime_ns for name in kept if name.endswith(".tar")}
        build_demo(out, scale=SCALE, seed=0, workers=1)
        assert bytes_below(out) == whole
        assert {name: (out / name).stat().st_mtime_ns for name in untouched} == untouched

    def test_a_finished_build_is_left_alone(self, corpus: Path) -> None:
        before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*.tar")}
        manifest = build_demo(corpus, scale=SCALE, seed=0, workers=1)
        assert manifest["samples"]["heldout/shape"] == 16
        assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*.tar")} == before

    def test_another_seed_is_refused_in_the_same_folder(self, corpus: Path) -> None:
        with pytest.raises(ValueError, match="holds another build"):
            build_demo(corpus, scale=SCALE, seed=1)


class TestHeldout:
    def test_digit_scans(self, samples: dict[str, list[Sample]]) -> None:
        used: dict[str, set[int]] = defaultdict(set)
        for name, group in samples.items():
            for sample in group:
                used[name.split("/")[0]] |= set(records(sample.meta["made_from"], "scan"))
        assert used["train"]
        assert used["heldout"]
        assert not used["train"] & used["heldout"]

    def test_photo_regions(self, samples: dict[str, list[Sample]]) -> None:
        seen: dict[str, dict[str, np.ndarray]] = {"train": {}, "heldout": {}}
        photos = load_assets().photos
        for name, group in samples.items():
            for sample in group:
                for crop in crops(sample.meta["made_from"]):
                    image = photos[crop["photo"]].image
                    mask = seen[name.split("/")[0]].setdefault(crop["photo"], np.zeros(image.size, bool))
                    x0, y0, x1, y1 = crop["box"]
                    mask[x0:x1, y0:y1] = True
        assert seen["train"].keys() & seen["heldout"].keys()
        for photo in seen["train"].keys() & seen["heldout"].keys():
            assert not (seen["train"][photo] & seen["heldout"][photo]).any(), photo

    def test_video_frames(self, samples: dict[str, list[Sample]]) -> None:
        frames: dict[str, set[tuple[str, int]]] = {"train": set(), "heldout": set()}
        for split, used in frames.items():
            for sample in samples[f"{split}/video"]:
                made_from = sample.meta["made_from"]
                used |= {(made_from["clip"], number) for number in made_from.get("frames", [])}
        assert frames["train"]
        assert frames["heldout"]
        assert not frames["train"] & frames["heldout"]

    def test_text_questions(self, samples: dict[str, list[Sample]]) -> None:
        asked = {split: [question(sample) for sample in samples[f"{split}/text"]] for split in ("train", "heldout")}
        assert not set(asked["train"]) & set(asked["heldout"])
        assert len(set(asked["heldout"])) == len(asked["heldout"])

    def test_retrieval_has_many_candidates(self, samples: dict[str, list[Sample]]) -> None:
        captions = [sample.meta["answer"] for kind in HELDOUT_PAIRS for sample in samples[f"heldout/{kind}"]]
        assert len(set(captions)) > len(captions) / 2  # digits and words repeat: equal captions are partners

    def test_full_build_has_enough_of_everything(self) -> None:
        plans = plan_shards(1.0, 0)
        assert sum(plan.samples for plan in plans if plan.split == "train") >= 25_000
        heldout = {plan.source: plan.samples for plan in plans if plan.split == "heldout"}
        assert heldout.pop("pairs") >= 200
        assert heldout == {task: 240 for task in TRAIN_SAMPLES if not task.startswith("pairs_")}


class TestAnswers:
    def test_last_turn_is_the_answer(self, samples: dict[str, list[Sample]]) -> None:
        for sample in (sample for group in samples.values() for sample in group):
            assert sample.messages[-1] == {"role": "assistant", "content": sample.meta["answer"]}
            assert sample.meta["metric"] in ("exact", "token_f1", "box_iou", "point")

    def test_shape_is_what_is_drawn(self, samples: dict[str, list[Sample]]) -> None:
        for sample in samples["train/shape"] + samples["heldout/shape"]:
            (thing,) = sample.meta["made_from"]["objects"]
            assert sample.meta["answer"] == f"{thing['colour']} {thing['shape']}"
            x0, y0, x1, y1 = thing["box"]
            centre = picture(next(iter(sample.media.values()))).getpixel(((x0 + x1) // 2, (y0 + y1) // 2))
            nearest = min(COLOURS, key=lambda name: np.linalg.norm(np.subtract(COLOURS[name], centre)))
            assert nearest == thing["colour"]

    def test_digit_is_the_label_of_the_scan(self, samples: dict[str, list[Sample]]) -> None:
        labels = load_assets().labels
        for sample in samples["train/digit"] + samples["train/pairs_digits"] + samples["heldout/digit"]:
            shown = [int(labels[digit["scan"]]) for digit in sample.meta["made_from"]["digits"]]
            names = [str(label) if sample.task == "digit" else NUMBERS[label] for label in shown]
            assert [word for word in sample.meta["answer"].split() if word in names] == names

    def test_counts_are_the_objects_drawn(self, samples: dict[str, list[Sample]]) -> None:
        for sample in samples["train/count"] + samples["train/pairs_counts"]:
            number, answer = len(sample.meta["made_from"]["objects"]), sample.meta["answer"].split()
            if sample.task == "count":
                assert answer == [str(number)]
            elif number == 1:
                assert answer[0] in ("a", "an")
            else:
                assert answer[0] == NUMBERS[number]
            if sample.task == "pairs_counts":
                assert answer[-1].endswith("s") == (number > 1 or answer[-1] == "cross")

    def test_places_are_where_the_objects_stand(self, samples: dict[str, list[Sample]]) -> None:
        for sample in samples["train/pairs_places"]:
            made_from = sample.meta["made_from"]
            for thing, words in zip(made_from["objects"], sample.meta["answer"].split(" and "), strict=True):
                (x0, y0, x1, y1), (width, height) = thing["box"], made_from["size"]
                assert f"{thing['colour']} {thing['shape']} at the " in words
                across, down = (x0, x1, width, "left", "right"), (y0, y1, height, "top", "bottom")
                for low, high, size, first, last in (across, down):
                    assert (first in words) == (low == 0 and high < size)
                    assert (last in words) == (high == size and low > 0)

    def test_digits_and_words_stand_out_from_the_paper(self, samples: dict[str, list[Sample]]) -> None:
        for sample in samples["train/digit"] + samples["train/ocr"]:
            levels = np.asarray(picture(next(iter(sample.media.values()))), dtype=float)
            brightness = luminance(levels.reshape(-1, 3).T)
            assert np.ptp(brightness) > 40

    def test_count(self, samples: dict[str, list[Sample]]) -> None:
        for sample in samples["train/count"]:
            things = sample.meta["made_from"]["objects"]
            assert sample.meta["answer"] == str(len(things))
            assert all(thing["shape"] in question(sample) for thing in things)
            for first in range(len(things)):
                for second in range(first):
                    assert not overlap(things[first]["box"], things[second]["box"])

    def test_ground(self, samples: dict[str, list[Sample]]) -> None:
        metrics = set()
        for sample in samples["train/ground"] + samples["heldout/ground"]:
            target, *others = sample.meta["made_from"]["objects"]
            width, height = picture(next(iter(sample.media.values()))).size
            assert [width, height] == sample.meta["made_from"]["size"]
            assert 0 <= target["box"][0] < target["box"][2] <= width
            assert 0 <= target["box"][1] < target["box"][3] <= height
            assert f"{target['colour']} {target['shape']}" in question(sample)
            assert not any(overlap(target["box"], other["box"]) for other in others)
            box = sample.meta["box"]
            exact = np.array(target["box"]) * 1000 / [width, height, width, height]
            assert np.abs(exact - box).max() <= 1
            numbers = [int(number) for number in re.findall(r"\d+", sample.meta["answer"])]
            assert all(0 <= number < 1000 for number in numbers)
            if sample.meta["metric"] == "box_iou":
                assert numbers == box
            else:
                assert box[0] < numbers[0] < box[2]
                assert box[1] < numbers[1] < box[3]
            metrics.add(sample.meta["metric"])
        assert metrics == {"box_iou", "point"}

    def test_compare(self, samples: dict[str, list[Sample]]) -> None:
        kinds = set()
        for sample in samples["train/compare"]:
            made_from = sample.meta["made_from"]
            kinds.add(made_from["kind"])
            if made_from["kind"] == "same_digit":
                left, right = records(made_from, "digit")
                assert sample.meta["answer"] == ("yes" if left == right else "no")
                continue
            things = [view["objects"][0] for view in made_from["pictures"]]
            names = [f"{thing['colour']} {thing['shape']}" for thing in things]
            expected = {
                "which": "first" if names[0] in question(sample) else "second",
                "name": names["second" in question(sample)],
                "same_colour": "yes" if things[0]["colour"] == things[1]["colour"] else "no",
            }
            assert sample.meta["answer"] == expected[made_from["kind"]]
            assert len(sample.media) == 2
        assert kinds == {"which", "name", "same_colour", "same_digit"}

    def test_scene_captions_name_what_stands_where(self, samples: dict[str, list[Sample]]) -> None:
        checked = 0
        for sample in samples["train/caption"] + samples["train/pairs_objects"]:
            made_from = sample.meta["made_from"]
            if "relation" not in made_from:
                continue
            first, second = (thing["box"] for thing in made_from["objects"])
            holds = {
                "left of": first[2] <= second[0],
                "right of": first[0] >= second[2],
                "above": first[3] <= second[1],
                "below": first[1] >= second[3],
            }
            assert holds[made_from["relation"]]
            words = sample.meta["answer"].split(f" {made_from['relation']} ")
            for text, thing in zip(words, made_from["objects"], strict=True):
                assert text.endswith(f"{thing['colour']} {thing['shape']}")
            checked += 1
        assert checked

    def test_photo_captions_are_the_written_ones(self, samples: dict[str, list[Sample]]) -> None:
        written = {card.file: (card.caption, card.wording) for card in PHOTOS}
        for sample in samples["train/pairs_photos"] + samples["heldout/pairs_photos"]:
            (crop,) = sample.meta["made_from"]["photos"]
            assert sample.meta["answer"] in written[crop["photo"]]

    def test_ocr_says_its_language(self, samples: dict[str, list[Sample]]) -> None:
        languages = set()
        for sample in samples["train/ocr"]:
            (word,) = sample.meta["made_from"]["words"]
            assert sample.meta["answer"] == word["word"]
            assert sample.meta["language"] == ("en" if word["word"].isascii() else "zh")
            languages.add(sample.meta["language"])
        assert languages == {"en", "zh"}

    def test_sums(self, samples: dict[str, list[Sample]]) -> None:
        sums = [sample for sample in samples["train/text"] if " + " in question(sample)]
        assert sums
        for sample in sums:
            assert sum(int(number) for number in re.findall(r"\d+", question(sample))) == int(sample.meta["answer"])

    def test_videos_move_as_told(self, samples: dict[str, list[Sample]]) -> None:
        kinds = set()
        for sample in samples["train/video"] + samples["heldout/video"]:
            made_from = sample.meta["made_from"]
            kinds.add(made_from["kind"])
            with av.open(io.BytesIO(sample.media["0.mp4"])) as container:
                frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert len(frames) == 8
            if made_from["kind"] == "move":
                step = np.subtract(made_from["path"][-1], made_from["path"][0])
                ways = {"left": step[0] < 0, "right": step[0] > 0, "up": step[1] < 0, "down": step[1] > 0}
                assert [way for way, holds in ways.items() if holds] == [sample.meta["answer"]]
                assert centre_of_change(frames) @ step > 0
            elif made_from["kind"] == "colours":
                assert sample.meta["answer"] == " then ".join(thing["colour"] for thing in made_from["objects"])
            else:
                assert sample.meta["answer"] in {card.caption for card in CLIPS if card.file == made_from["clip"]}
        assert kinds == {"move", "colours", "scene"}


class TestIndex:
    def test_every_shard_has_an_index_for_the_tokenizer(self, corpus: Path) -> None:
        shards = sorted(corpus.glob("*/*.tar"))
        assert len(shards) == len(plan_shards(SCALE, 0))
        for shard in shards:
            header = open_header(str(shard), corpus / "tokenizer")
            rows = read_columns(str(shard), ["error", "text_tokens"]).to_pylist()
            assert header.rows == len(rows)
            assert all(row["error"] is None and row["text_tokens"] < 80 for row in rows)


class TestTokenizer:
    def test_special_tokens_have_their_ids(self, corpus: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer", local_files_only=True)
        assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(22))
        assert tokenizer.eos_token == "<|im_end|>"
        assert tokenizer.pad_token == "<|endoftext|>"
        assert len(tokenizer) <= MAX_VOCABULARY

    @pytest.mark.parametrize(
        "text", ["a red circle", "月亮 and 学校", "unseen Ωmega\n\n 3.14", "<|box_start|>[[0,250,500,999]]<|box_end|>"]
    )
    def test_round_trip(self, corpus: Path, text: str) -> None:
        tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer", local_files_only=True)
        assert tokenizer.decode(tokenizer(text).input_ids) == text

    def test_digits_are_single_tokens_and_boxes_survive_decoding(self, corpus: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer", local_files_only=True)
        assert [tokenizer.decode([token]) for token in tokenizer("2508").input_ids] == list("2508")
        answer = "<|point_start|>[[1,2]]<|point_end|>"
        ids = tokenizer(f"{answer}<|im_end|>").input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == answer

    def test_same_texts_same_bytes(self, tmp_path: Path) -> None:
        texts = ["a red circle", "a blue circle", "月亮", "月亮 12"] * 5
        for name in ("one", "two"):
            train_tokenizer(iter(texts), tmp_path / name)
        assert bytes_below(tmp_path / "one") == bytes_below(tmp_path / "two")
        assert len(json.loads((tmp_path / "one" / "tokenizer.json").read_text())["model"]["vocab"]) < MAX_VOCABULARY


class TestAssets:
    def test_a_missing_package_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(assets.PACKAGES, "no_such_package_here", ("scikit-nothing", "data"))
        with pytest.raises(MissingAssetError, match=r"scikit-nothing.*keye_train\[demo\]"):
            locate("no_such_package_here", "picture.png")

    def test_some_scans_of_each_digit_are_held_out(self) -> None:
        loaded = load_assets()
        for digit in range(10):
            train, heldout = (set(loaded.scan_ids(split, digit).tolist()) for split in ("train", "heldout"))
            assert len(heldout) >= 25
            assert not train & heldout


def crops(value: Any) -> list[dict[str, Any]]:
    """Records of photo crops anywhere in a record."""
    if isinstance(value, dict):
        return [value] if "photo" in value else [crop for inner in value.values() for crop in crops(inner)]
    return [crop for inner in value for crop in crops(inner)] if isinstance(value, list) else []


def overlap(left: list[int], right: list[int]) -> bool:
    return left[0] < right[2] and right[0] < left[2] and left[1] < right[3] and right[1] < left[3]


def centre_of_change(frames: list[np.ndarray]) -> np.ndarray:
    """Way (x, y) in pixels that the thing on a plain ground travels, seen in the decoded frames."""
    ground = np.median(np.stack(frames).reshape(-1, 3), axis=0)
    centres = []
    for frame in (frames[0], frames[-1]):
        mask = np.abs(frame.astype(float) - ground).sum(axis=2) > 60
        rows, columns = np.nonzero(mask)
        centres.append(np.array([columns.mean(), rows.mean()]))
    return centres[1] - centres[0]
