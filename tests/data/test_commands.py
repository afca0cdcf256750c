"""Promise: what ``keye-data`` writes can be trained on, what it says is true, and its errors name the fix."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from toy_shards import chat, mixed_samples, picture, toy_resolution
from transformers import PreTrainedTokenizerFast

from data_tools.check import SampleDecoder, check_shard
from data_tools.cli import COMMANDS, main
from data_tools.requeue_cmd import find_places
from data_tools.shards import sample_key, write_shard
from data_tools.stats import histogram, summarise
from keye_train.data.corpus import Corpus
from keye_train.data.formats import parse_sample
from keye_train.data.index import read_columns, tokenizer_fingerprint
from keye_train.data.indexing import build_index
from keye_train.data.opening import open_header
from keye_train.data.paths import index_path
from keye_train.data.quarantine import Quarantine
from keye_train.data.reader import walk_shard
from keye_train.sample import Sample, SampleRef
from keye_train.settings import SourceSettings, StorageSettings

MakeShard = Callable[..., Path]
Refused = Callable[..., str]


def keye_data(*arguments: object) -> int | str | None:
    """Exit status of the command."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def read_samples(shard: Path) -> list[Sample]:
    return [parse_sample(SampleRef("", str(shard), raw.key), raw.members) for raw in walk_shard(shard)]


# --------------------------------------------------------------------------------------------------------- index


def test_index_makes_shards_ready_and_skips_those_that_are(
    tmp_path: Path, make_shard: MakeShard, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        make_shard(tmp_path / f"{number}.tar", mixed_samples(4, number), index=False)
    pattern = tmp_path / "*.tar"
    assert keye_data("index", pattern, "--tokenizer", tokenizer_dir, "--workers", 1) == 0
    assert "indexed 3 shards with 12 samples; 0 were up to date" in capsys.readouterr().out
    assert len(Corpus.open({"a": SourceSettings([str(pattern)])}, tokenizer_dir, toy_resolution()).sources["a"]) == 12
    index_path(tmp_path / "1.tar").unlink()
    make_shard(tmp_path / "2.tar", mixed_samples(6, 2), index=False)
    assert keye_data("index", pattern, "--tokenizer", tokenizer_dir, "--workers", 1) == 0
    assert "indexed 2 shards with 10 samples; 1 were up to date" in capsys.readouterr().out


def test_folders_with_a_broken_layout_are_all_named_and_the_other_shards_indexed(
    tmp_path: Path, make_shard: MakeShard, tokenizer_dir: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = {"yaml": "field_map: [", "kind": json.dumps({"sample_type": {"__class__": "Odd"}, "field_map": {}})}
    for name in ("good", *broken):
        for number in range(2):
            make_shard(tmp_path / f"{name}/shards/{number}.tar", mixed_samples(4, number), index=False)
    for name, text in broken.items():
        (tmp_path / name / ".nv-meta").mkdir()
        (tmp_path / name / ".nv-meta/dataset.yaml").write_text(text)
    words = ("index", tmp_path / "*/shards/*.tar", "--tokenizer", tokenizer_dir, "--workers", 0)
    said = refused(*words)
    for name, reason in (("yaml", "is not valid YAML"), ("kind", "has the sample type Odd")):
        assert f"{tmp_path}/{name}/.nv-meta/dataset.yaml {reason}" in said
        assert all(f"{name}/shards/{number}.tar" in said for number in range(2))
        assert not index_path(tmp_path / f"{name}/shards/0.tar").exists()
    assert "mend the files and run this again" in said
    assert all(index_path(tmp_path / f"good/shards/{number}.tar").exists() for number in range(2))
    for name in broken:
        (tmp_path / name / ".nv-meta/dataset.yaml").unlink()
    assert keye_data(*words) == 0
    assert "indexed 4 shards with 16 samples; 2 were up to date" in capsys.readouterr().out


def test_processes_write_the_same_indexes(tmp_path: Path, make_shard: MakeShard, tokenizer_dir: Path) -> None:
    shards = [make_shard(tmp_path / f"{number}.tar", mixed_samples(4, number)) for number in range(2)]
    written = [index_path(shard).read_bytes() for shard in shards]
    assert keye_data("index", *shards, "--force", "--tokenizer", tokenizer_dir, "--workers", 2) == 0
    assert [index_path(shard).read_bytes() for shard in shards] == written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("index", "none-*.tar", "--tokenizer", "."), "no shard matches none-*.tar"),
        (("index", "setup.cfg", "--tokenizer", "."), "has no tokenizer.json"),
        (("stats", "none.tar"), "the shard none.tar does not exist"),
        (("ingest", "none.parquet", "--out", "o", "--tokenizer", "."), "has no tokenizer.json"),
    ],
)
def test_mistakes_get_one_line_and_no_traceback(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert message in refused(*arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert keye_data(command, "--help") == 0
    shown = capsys.readouterr().out
    assert "usage: keye-data" in shown
    assert f"keye-data {command} " in shown.partition("examples:")[2]


def test_an_index_that_cannot_be_written_names_the_way_out(
    tmp_path: Path, make_shard: MakeShard, tokenizer_dir: Path, refused: Refused
) -> None:
    shard = make_shard(tmp_path / "a.tar", [{"txt": b"hello"}], index=False)
    Path(f"{shard}.idx").mkdir()  # as a read-only folder, which binds no superuser
    said = refused("index", shard, "--tokenizer", tokenizer_dir, "--workers", 0)
    assert "the index cannot be written: " in said
    assert "--index-dir and data.storage.index_dir" in said
    assert sorted(tmp_path.iterdir()) == [shard, Path(f"{shard}.idx")]


# --------------------------------------------------------------------------------------------------------- check


def test_check_passes_good_shards_and_names_bad_samples(
    tmp_path: Path, make_shard: MakeShard, capsys: pytest.CaptureFixture[str]
) -> None:
    good = make_shard(tmp_path / "good.tar", mixed_samples(8))
    assert list(check_shard(str(good), decode=True)) == []
    samples = mixed_samples(8)
    samples[2] = {"json": b"{"}
    samples[4] = {"jpg": b"not a picture", "txt": b"which the index has found out"}
    samples[5] = {"jpg": picture(80, 60)[:-1500], "txt": b"cut off behind its header"}
    bad = make_shard(tmp_path / "bad.tar", samples)
    assert [problem.key for problem in check_shard(str(bad))] == ["000000002", "000000004"]
    assert [problem.key for problem in check_shard(str(bad), decode=True)] == ["000000002", "000000004", "000000005"]
    capsys.readouterr()
    assert keye_data("check", bad) == 1
    assert "2 problems" in capsys.readouterr().out


def test_check_holds_decoders_to_limits(
    tmp_path: Path, make_shard: MakeShard, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    file = io.BytesIO()
    Image.new("RGB", (4000, 4000)).save(file, "PNG")  # 48 MB of pixels
    samples = [{"jpg": picture(40, 40)}, {"png": file.getvalue()}, {"jpg": picture(80, 60)[:-1500]}]
    shard = make_shard(tmp_path / "large.tar", [{**members, "txt": b"a pair"} for members in samples])
    assert keye_data("check", shard, "--decode", "--decode-bytes", 2**25) == 1
    printed = capsys.readouterr()
    lines = [line.split("\t")[1:] for line in (printed.out + printed.err).splitlines() if line.startswith(str(shard))]
    assert [key for key, _ in lines] == ["000000001", "000000002"]
    assert lines[0][1] == "decoding takes more than --decode-bytes=33554432 of memory"
    assert "broken image" in lines[1][1]
    # One that brought its process down comes back with the reason.
    assert SampleDecoder()((SampleRef("", "", ""), {}), {0: "SIGSEGV"}) == "SIGSEGV"
    assert "--decode-seconds is above 0" in refused("check", shard, "--decode", "--decode-seconds", 0)


def test_check_finds_a_changed_byte(tmp_path: Path, make_shard: MakeShard) -> None:
    shard = make_shard(tmp_path / "a.tar", [{"txt": b"hello"}])
    shard.write_bytes(shard.read_bytes().replace(b"hello", b"jello"))
    assert [problem.reason for problem in check_shard(str(shard))] == [
        "the checksum differs from the index: the shard was changed or damaged after it was indexed"
    ]
    index_path(shard).unlink()
    assert [problem.reason for problem in check_shard(str(shard))] == ["no index: run keye-data index"]


# ------------------------------------------------------------------------------------------------------- requeue


def test_a_list_of_what_is_left_excludes_no_other_sample_of_a_mended_shard(
    tmp_path: Path, make_shard: MakeShard, tokenizer: PreTrainedTokenizerFast, tokenizer_dir: Path
) -> None:
    shard = make_shard(tmp_path / "a.tar", [{"txt": f"text {number}".encode()} for number in range(6)])
    old = open_header(str(shard), tokenizer_dir).sha256
    line = {"source": "a", "shard": str(shard), "reason": "broken", "sha256": old}
    entries = [{**line, "key": sample_key(row), "row": row} for row in (2, 4)]
    write_shard(shard, ((sample_key(number), {"txt": b"mended"}) for number in (0, 1, 3, 4, 5)))  # 2 is gone
    build_index(shard, tokenizer, tokenizer_fingerprint(tokenizer_dir))
    places = find_places(entries, tokenizer_dir, StorageSettings())
    assert [row for _, row in places] == [None, 3]
    left = tmp_path / "left.jsonl"
    left.write_text("".join(json.dumps(entry) + "\n" for entry, _ in places))
    (source,) = Corpus.open({"a": SourceSettings([str(shard)])}, tokenizer_dir, toy_resolution()).sources.values()
    assert Quarantine([str(left)]).rows(source) == {3: "quarantined (broken)"}  # where key 4 stands now


# --------------------------------------------------------------------------------------------------------- stats


def test_stats_count_what_the_plan_counts(
    toy_sources: dict[str, SourceSettings], tokenizer_dir: Path, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    source = Corpus.open(toy_sources, tokenizer_dir, toy_resolution()).sources["a"]
    summary = summarise(list(source.shards), toy_resolution())
    np.testing.assert_array_equal(summary.sizes.tokens, source.sizes.tokens)
    np.testing.assert_array_equal(summary.sizes.patches, source.sizes.patches)
    assert summary.usable == len(source)
    settings = [f"--set={name}={value}" for name, value in vars(toy_resolution()).items()]
    assert keye_data("stats", *source.shards, *settings) == 0
    shown = capsys.readouterr().out
    assert "2 shards, 48 samples, 48 of them usable" in shown
    total = next(line for line in shown.splitlines() if line.startswith("all ")).split()
    assert total[1:4] == ["48", "100.0%", str(source.sizes.tokens.sum())]
    assert total[-1] == str(source.sizes.patches.sum())
    assert "NAME=VALUE" in refused("stats", *source.shards, "--set", "nothing=3")


def test_stats_of_a_shard_that_was_written_anew_are_refused(
    tmp_path: Path, make_shard: MakeShard, refused: Refused
) -> None:
    """Its index is of the shard that stood there before: the numbers would be of no shard at all."""
    shard = make_shard(tmp_path / "a.tar", [{"txt": b"hello"}])
    with shard.open("ab") as file:
        file.write(bytes(512))
    assert f"is stale: it was made when the shard had {shard.stat().st_size - 512} bytes" in refused("stats", shard)
    index_path(shard).unlink()
    assert f"has no index; run: keye-data index {shard} --tokenizer DIR" in refused("stats", shard)
    assert "'fast' is no float" in refused("stats", shard, "--set", "video_fps=fast")
    assert "image_min_tokens must be above 0 and at most" in refused("stats", shard, "--set", "image_min_tokens=99999")


def test_what_a_sample_says_of_itself_steers_no_terminal(
    tmp_path: Path, make_shard: MakeShard, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reasons and tasks hold names that strangers chose."""
    attack = "a\x1b[2J\nall is well"
    shard = make_shard(tmp_path / "a.tar", [{"json": chat("?", "!", image=attack)}])
    assert keye_data("check", shard) == 1
    checked = capsys.readouterr()
    (line,) = [line for line in (checked.out + checked.err).splitlines() if "messages name the image" in line]
    assert "all is well" in line
    assert keye_data("stats", shard) == 0
    shown = capsys.readouterr().out
    assert "messages name the image" in shown
    assert "\x1b" not in shown + line


def test_the_histogram_counts_every_sample_in_its_bar() -> None:
    lines = histogram(np.array([1, 2, 3, 4, 7, 8, 1000]))
    assert [line.split()[:4] for line in lines[:4]] == [
        ["1", "-", "1", "1"],
        ["2", "-", "3", "2"],
        ["4", "-", "7", "2"],
        ["8", "-", "15", "1"],
    ]
    assert lines[-1].split()[:4] == ["512", "-", "1023", "1"]


# -------------------------------------------------------------------------------------------------------- ingest


def test_ingest_captions_of_a_saved_dataset(tmp_path: Path, tokenizer_dir: Path) -> None:
    pictures = [picture(40, 30, number, kind) for number, kind in enumerate(("JPEG", "PNG", "WEBP"))]
    table = datasets.Dataset.from_dict(
        {
            "picture": [{"bytes": data, "path": None} for data in pictures],
            "caption": ["one", "zwei", "三"],
            "answer": [1, 2, None],
        }
    ).cast_column("picture", datasets.Image())
    table.save_to_disk(tmp_path / "table")
    out = tmp_path / "out"
    status = keye_data(
        *("ingest", tmp_path / "table", "--out", out, "--tokenizer", tokenizer_dir, "--image-column", "picture"),
        *("--text-column", "caption", "--task", "seen", "--shard-samples", 2, "--name", "part"),
    )
    assert status == 0
    shards = sorted(out.glob("*.tar"))
    assert [shard.name for shard in shards] == ["part-00000.tar", "part-00001.tar"]
    samples = [sample for shard in shards for sample in read_samples(shard)]
    assert [list(sample.media.items()) for sample in samples] == [
        [("0.jpg", pictures[0])],
        [("0.png", pictures[1])],
        [("0.webp", pictures[2])],
    ]
    assert [sample.messages[1]["content"] for sample in samples] == ["one", "zwei", "三"]
    assert [sample.meta for sample in samples] == [{"answer": 1}, {"answer": 2}, {}]
    assert {sample.task for sample in samples} == {"seen"}
    assert sum(open_header(str(shard), tokenizer_dir).rows for shard in shards) == 3


def test_ingest_conversations_with_several_images_by_path(tmp_path: Path, tokenizer_dir: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(picture(30, 30, number))
    question = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    rows = [
        {
            "image": ["0.jpg", "1.jpg"],
            "talk": json.dumps([{"role": "user", "content": question}, {"role": "assistant", "content": "two"}]),
        }
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ("--out", tmp_path / "out", "--tokenizer", tokenizer_dir)
    assert keye_data("ingest", tmp_path / "rows.jsonl", *common, "--messages-column", "talk") == 0
    shard = tmp_path / "out/shard-00000.tar"
    (sample,) = read_samples(shard)
    assert sample.messages[0]["content"] == [
        {"type": "image", "image": "0.jpg"},
        {"type": "text", "text": "and"},
        {"type": "image", "image": "1.jpg"},
    ]
    assert sample.task == "chat"
    assert read_columns(str(shard), ["error"])["error"].to_pylist() == [None]


def test_ingest_pure_text_of_parquet(tmp_path: Path, tokenizer_dir: Path, refused: Refused) -> None:
    datasets.Dataset.from_dict({"text": ["hello", "world"]}).to_parquet(str(tmp_path / "a.parquet"))
    common = ("--out", tmp_path / "out", "--tokenizer", tokenizer_dir)
    assert keye_data("ingest", tmp_path / "a.parquet", *common, "--text-column", "text") == 0
    samples = read_samples(tmp_path / "out/shard-00000.tar")
    assert [sample.messages for sample in samples] == [
        [{"role": "assistant", "content": text}] for text in ("hello", "world")
    ]
    assert "no column 'caption'" in refused("ingest", tmp_path / "a.parquet", *common, "--text-column", "caption")
    assert "give --text-column or --messages-column" in refused("ingest", tmp_path / "a.parquet", *common)


def test_ingest_leaves_no_shard_of_an_earlier_table(tmp_path: Path, tokenizer_dir: Path, refused: Refused) -> None:
    """They would be trained on beside the new ones: a recipe names them by one pattern."""
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    words = ("ingest", rows, "--out", out, "--tokenizer", tokenizer_dir, "--text-column", "text")
    rows.write_text("".join(json.dumps({"text": f"old {number}"}) + "\n" for number in range(3)))
    assert keye_data(*words, "--shard-samples", 1) == 0
    rows.write_text('{"text": "new"}\n')
    (out / "shard-of-another-table-00001.tar").touch()
    assert "has 3 shards shard-NUMBER.tar" in refused(*words)
    assert keye_data(*words, "--overwrite") == 0
    assert {path.name.partition(".")[0] for path in out.iterdir()} == {"shard-00000", "shard-of-another-table-00001"}
    assert [sample.messages[0]["content"] for sample in read_samples(out / "shard-00000.tar")] == ["new"]
    assert "--shard-samples and --shard-mb are at least 1" in refused(*words, "--shard-samples", 0)


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        ([{"role": "user"}], "has no role and content"),
        ({"role": "user", "content": "?"}, "expected a list of messages"),
        ([{"role": "user", "content": [{"text": "?"}]}], "of a message is no"),
    ],
)
def test_ingest_names_a_conversation_that_is_none(
    talk: object, message: str, tmp_path: Path, tokenizer_dir: Path, refused: Refused
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"talk": json.dumps(talk)}) + "\n")
    words = ("--out", tmp_path / "out", "--tokenizer", tokenizer_dir, "--messages-column", "talk")
    said = refused("ingest", tmp_path / "rows.jsonl", *words)
    assert "row 0: " in said
    assert message in said


def test_ingest_names_the_row_that_is_wrong(tmp_path: Path, tokenizer_dir: Path, refused: Refused) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "fine", "image": null}\n{"text": "no file", "image": "gone.jpg"}\n')
    common = ("--out", tmp_path / "out", "--tokenizer", tokenizer_dir)
    assert "row 1: " in refused("ingest", tmp_path / "rows.jsonl", *common, "--text-column", "text")
    assert not list((tmp_path / "out").glob("*"))
