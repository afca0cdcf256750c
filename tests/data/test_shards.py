"""Promise: shard and index exist whole or not at all, depend on the samples alone, and hostile ones do no harm."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from toy_shards import Members, chat, clip, mixed_samples, picture, toy_resolution
from transformers import PreTrainedTokenizerFast

from data_tools.shards import sample_key, write_shard, write_shards
from keye_train.data.corpus import Corpus
from keye_train.data.formats import parse_sample, split_member_name
from keye_train.data.index import read_columns, tokenizer_fingerprint
from keye_train.data.indexing import build_index
from keye_train.data.opening import open_header
from keye_train.data.paths import find_shards, index_path
from keye_train.data.reader import ShardReader, offsets_path, walk_shard
from keye_train.sample import SampleError, SampleRef
from keye_train.settings import SourceSettings

REF = SampleRef("source", "shard.tar", "key")
MakeShard = Callable[..., Path]


def keyed(samples: list[Members]) -> list[tuple[str, Members]]:
    return [(sample_key(number), members) for number, members in enumerate(samples)]


# ------------------------------------------------------------------------------------------------------- writing


def test_the_bytes_of_a_shard_and_its_index_depend_on_the_samples_alone(tmp_path: Path, make_shard: MakeShard) -> None:
    one = make_shard(tmp_path / "one.tar", mixed_samples(12))
    two = make_shard(tmp_path / "two.tar", mixed_samples(12))
    for path in (lambda shard: shard, index_path, offsets_path):
        assert path(one).read_bytes() == path(two).read_bytes()


def test_webdataset_reads_what_was_written(tmp_path: Path) -> None:
    samples = mixed_samples(8)
    write_shard(tmp_path / "a.tar", keyed(samples))
    read = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [key for key, _ in keyed(samples)]
    for sample, members in zip(read, samples, strict=True):
        assert {name: data for name, data in sample.items() if not name.startswith("__")} == members


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def broken_samples():
        yield "000", {"txt": b"fine"}
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "a.tar", broken_samples())
    assert list(tmp_path.iterdir()) == []


def test_a_new_shard_takes_the_old_index_away(tmp_path: Path, make_shard: MakeShard) -> None:
    shard = make_shard(tmp_path / "a.tar", mixed_samples(4))
    make_shard(shard, mixed_samples(5), index=False)
    assert not index_path(shard).exists()
    assert not offsets_path(shard).exists()


def test_samples_are_spread_over_shards_within_both_limits(tmp_path: Path) -> None:
    samples = [(sample_key(number), {"txt": b"x" * size}) for number, size in enumerate([10, 10, 10, 90, 300, 10])]
    shards = list(write_shards(tmp_path, "part", samples, max_samples=2, max_bytes=100))
    assert [shard.samples for shard in shards] == [2, 2, 1, 1]
    assert [shard.path.name for shard in shards] == [f"part-{number:05d}.tar" for number in range(4)]
    assert [raw.key for shard in shards for raw in walk_shard(shard.path)] == [key for key, _ in samples]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([("a.b", {"txt": b""})], "has no dot"),
        ([("a", {"txt": b""}), ("a", {"txt": b""})], "comes twice"),
        ([("a", {"pyd": b""})], "refused"),
        ([("a", {})], "no members"),
    ],
)
def test_names_that_readers_would_refuse_are_not_written(
    tmp_path: Path, samples: list[tuple[str, Members]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "a.tar", samples)


# ------------------------------------------------------------------------------------------------------- layouts


def test_accepted_layouts() -> None:
    jpeg = picture(30, 20)
    pair = parse_sample(REF, {"jpg": jpeg, "txt": b" a cat \n"})
    assert pair.messages[0]["content"] == [{"type": "image", "image": "jpg"}]
    assert pair.messages[1] == {"role": "assistant", "content": "a cat"}
    assert (pair.task, pair.media) == ("caption", {"jpg": jpeg})
    assert parse_sample(REF, {"webp": jpeg, "json": b'{"caption": "a cat", "url": "u"}'}).meta == {"url": "u"}
    both = parse_sample(REF, {"png": jpeg, "txt": b"from txt", "json": b'{"caption": "from json"}'})
    assert both.messages[1]["content"] == "from txt"
    for members in ({"txt": b"hello"}, {"json": b'{"text": "hello"}'}):
        text = parse_sample(REF, members)
        assert (text.task, text.messages) == ("text", [{"role": "assistant", "content": "hello"}])
    talk = parse_sample(REF, {"0.jpg": jpeg, "1.jpg": jpeg, "json": chat("q", "a", image="1.jpg")})
    assert (talk.task, list(talk.media)) == ("vqa", ["1.jpg"])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"json": b"{"}, "not valid JSON"),
        ({"json": b"\xff\xfe"}, "not valid JSON"),
        ({"json": b"[" * 100_000}, "not valid JSON"),
        ({"json": b"[1]"}, "expected an object"),
        ({"json": b'{"messages": {}}'}, "expected a list"),
        ({"json": b'{"messages": []}'}, "without messages"),
        ({"json": b'{"messages": [{"role": "user", "content": "q"}]}'}, "no assistant turn"),
        ({"json": b'{"messages": [{"role": "wizard", "content": "q"}]}'}, "wizard"),
        ({"json": chat("q", "a", image="0.jpg")}, "names? the image '0.jpg'"),
        ({"json": chat("q", "a", image="../../etc/passwd")}, "etc/passwd"),
        ({"json": chat("q", "a", video="0.jpg"), "0.jpg": b""}, "names? the video '0.jpg'"),
        ({"txt": b"\xff"}, "not UTF-8"),
        ({"txt": b" \n"}, "empty"),
        ({"jpg": b""}, "no known layout"),
        ({"jpg": b"", "png": b"", "txt": b"which?"}, "several media"),
        ({"cls": b"3"}, "no known layout"),
        ({"txt": b"x", "pyd": b""}, "unpickled"),
        ({"json": b'{"text": "x", "task": 3}'}, "'task' is int"),
    ],
)
def test_other_layouts_are_refused_with_the_reason(members: Members, message: str) -> None:
    with pytest.raises(SampleError, match=message):
        parse_sample(REF, members)


@pytest.mark.parametrize("name", ["/etc/passwd.txt", "../a.txt", "a/../../b.txt", "a\\b.txt", "plain", ".txt", "a."])
def test_member_names_that_leave_the_archive_or_have_no_key_are_refused(name: str) -> None:
    with pytest.raises(SampleError):
        split_member_name(name)


# ------------------------------------------------------------------------------------------------ hostile archives


class Bomb:
    """Would write a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def hostile_shard(tmp_path: Path) -> Path:
    """Good samples between bad ones of many kinds."""
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "folder", type=tarfile.DIRTYPE)
        add(tar, "good0.txt", b"hello")
        add(tar, "link.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "hard.txt", type=tarfile.LNKTYPE, linkname="good0.txt")
        add(tar, "device.txt", type=tarfile.CHRTYPE)
        add(tar, "../up.txt", b"x")
        add(tar, "/abs.txt", b"x")
        add(tar, "pickled.pyd", pickle.dumps(Bomb(tmp_path / "pwned")))
        add(tar, "pickled.txt", b"x")
        add(tar, "twice.txt", b"x")
        add(tar, "twice.txt", b"y")
        add(tar, "good1" + "x" * 200 + ".txt", b"a long name needs an extended header")
        add(tar, "cut.jpg", picture(40, 30)[:20])
        add(tar, "cut.txt", b"broken picture")
        add(tar, "thin.png", picture(3000, 5, kind="PNG"))
        add(tar, "thin.txt", b"too thin")
        add(tar, "utf\udcff.txt", b"x")
        add(tar, "bare", b"x")
        add(tar, "good2.txt", b"world")
    return path


def test_bad_samples_of_every_kind_stand_in_the_index_with_their_reason(
    hostile_shard: Path, tokenizer: PreTrainedTokenizerFast, tokenizer_dir: Path
) -> None:
    build_index(hostile_shard, tokenizer, tokenizer_fingerprint(tokenizer_dir))
    errors = {row["key"]: row["error"] for row in read_columns(str(hostile_shard), ["key", "error"]).to_pylist()}
    good = {key for key, error in errors.items() if error is None}
    assert good == {"good0", "good1" + "x" * 200, "good2", "thin"}
    for key in ("link", "hard", "device"):
        assert "not a regular file" in errors[key]
    assert "unpickled" in errors["pickled"]
    assert "appears twice" in errors["twice"]
    assert "jpg" in errors["cut"]
    assert sum("leaves the archive" in (error or "") for error in errors.values()) == 2
    corpus = Corpus.open({"a": SourceSettings([str(hostile_shard)])}, tokenizer_dir, toy_resolution())
    assert "aspect ratio" in corpus.sources["a"].errors[list(errors).index("thin")]
    assert not (hostile_shard.parent / "pwned").exists()


def test_reading_by_offset_equals_walking_for_good_and_bad_samples(
    hostile_shard: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    build_index(hostile_shard, tokenizer, "any")
    reader = ShardReader()
    for row, raw in enumerate(walk_shard(hostile_shard)):
        if raw.error is None:
            assert reader.read(str(hostile_shard), row) == (raw.key, raw.members)
        else:
            with pytest.raises(SampleError):
                reader.read(str(hostile_shard), row)
    reader.close()


@pytest.mark.parametrize("damage", ["cut in a member", "cut in a header", "garbage header", "no end", "empty file"])
def test_a_damaged_archive_keeps_what_is_whole_and_names_the_rest(tmp_path: Path, damage: str) -> None:
    shard = tmp_path / "a.tar"
    write_shard(shard, [(sample_key(n), {"txt": b"x" * 600}) for n in range(3)])  # 3 blocks each
    data = shard.read_bytes()
    shard.write_bytes(
        {
            "cut in a member": data[: 2 * 1536 + 700],
            "cut in a header": data[: 2 * 1536 + 100],
            "garbage header": data[: 2 * 1536] + b"\x07" * 512 + data[2 * 1536 + 512 :],
            "no end": data[: 3 * 1536],
            "empty file": b"",
        }[damage]
    )
    rows = list(walk_shard(shard))
    good = [row for row in rows if row.error is None]
    bad = [row for row in rows if row.error is not None]
    assert len(good) == {"no end": 3, "empty file": 0}.get(damage, 2)
    assert len(bad) == (0 if damage == "no end" else 1)
    assert all(row.offset + row.size <= shard.stat().st_size for row in rows)


def test_a_forged_size_does_not_send_the_walk_round_in_circles(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("a.txt").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xf8\x00"  # a negative number in base 256
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    (tmp_path / "a.tar").write_bytes(bytes(header) * 3)
    rows = list(walk_shard(tmp_path / "a.tar"))
    assert len(rows) == 1
    assert "damaged at byte 0" in str(rows[0].error)


# --------------------------------------------------------------------------------------------------------- index


def test_rows_of_the_index(tmp_path: Path, make_shard: MakeShard) -> None:
    samples = [
        {"txt": b"hello"},
        {"0.jpg": picture(50, 40), "1.png": picture(30, 60, kind="PNG"), "json": chat("q", "a", image="1.png")},
        {"0.mp4": clip(64, 48, 8), "json": chat("q", "a", video="0.mp4")},
    ]
    shard = make_shard(tmp_path / "a.tar", samples)
    table = pq.read_table(index_path(shard)).to_pylist()
    assert [row["key"] for row in table] == [sample_key(number) for number in range(3)]
    assert [row["error"] for row in table] == [None] * 3
    assert [row["task"] for row in table] == ["text", "vqa", "vqa"]
    assert [row["media"] for row in table] == [
        [],
        [{"kind": "image", "width": 30, "height": 60, "frames": 1, "fps": 0.0}],
        [{"kind": "video", "width": 64, "height": 48, "frames": 8, "fps": 8.0}],
    ]
    offsets = np.fromfile(offsets_path(shard), dtype="<u8")
    assert offsets[:-1].tolist() == [row["offset"] for row in table]
    assert offsets[-1] == table[-1]["offset"] + table[-1]["size"]


def test_opening_a_source_without_fitting_indexes_names_shard_and_command(
    tmp_path: Path, make_shard: MakeShard, tokenizer_dir: Path, foreign_tokenizer_dir: Path
) -> None:
    shard = make_shard(tmp_path / "my shard.tar", mixed_samples(4))
    open_header(str(shard), tokenizer_dir)
    command = rf"keye-data index '{shard}' --tokenizer"
    with pytest.raises(ValueError, match=f"another tokenizer.*{command}"):
        open_header(str(shard), foreign_tokenizer_dir)
    with shard.open("ab") as file:
        file.write(b"\0" * 512)
    with pytest.raises(ValueError, match=f"stale.*{command}"):
        open_header(str(shard), tokenizer_dir)
    make_shard(shard, mixed_samples(4))
    index_path(shard).write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(ValueError, match=f"damaged.*{command}"):
        open_header(str(shard), tokenizer_dir)
    offsets_path(shard).unlink()
    with pytest.raises(ValueError, match=f"has no index.*{command}"):
        open_header(str(shard), tokenizer_dir)
    shard.unlink()
    with pytest.raises(ValueError, match=r"my shard\.tar does not exist"):
        open_header(str(shard), tokenizer_dir)


def test_an_index_of_another_format_is_refused(tmp_path: Path, make_shard: MakeShard, tokenizer_dir: Path) -> None:
    shard = make_shard(tmp_path / "a.tar", mixed_samples(2))
    table = pq.read_table(index_path(shard))
    pq.write_table(table.replace_schema_metadata({"version": "0"}), index_path(shard))
    with pytest.raises(ValueError, match=r"has format 0.*keye-data index"):
        open_header(str(shard), tokenizer_dir)


def test_patterns(tmp_path: Path) -> None:
    for name in ("a-0.tar", "a-1.tar", "b-0.tar"):
        (tmp_path / name).touch()
    names = [Path(path).name for path in find_shards([f"{tmp_path}/a-*.tar", f"{tmp_path}/{{a,b}}-0.tar"])]
    assert names == ["a-0.tar", "a-1.tar", "b-0.tar"]
    for pattern, message in (
        (f"{tmp_path}/c-*.tar", "no shard matches"),
        (f"{tmp_path}/c.tar", "does not exist"),
        ("s3://bucket/a.tar", "set data.storage.allow_network=true"),
    ):
        with pytest.raises(ValueError, match=message):
            find_shards([pattern])


def test_pairs_cost_the_same_tokens_and_other_samples_are_no_pairs(
    tmp_path: Path, make_shard: MakeShard, tokenizer_dir: Path
) -> None:
    samples = [
        {"jpg": picture(56, 56), "txt": b"one"},
        {"txt": b"no picture"},
        {"0.mp4": clip(64, 48, 4), "json": chat("q", "a", video="0.mp4")},
    ]
    shard = make_shard(tmp_path / "a.tar", samples)
    corpus = Corpus.open({"a": SourceSettings([str(shard)])}, tokenizer_dir, toy_resolution(), pair_tokens=16)
    source = corpus.sources["a"]
    assert source.sizes.tokens.tolist() == [16, 16, 16]
    assert source.sizes.patches[0] == 16
    assert {row: reason.partition(":")[0] for row, reason in source.errors.items()} == {
        1: "not an image-caption pair",
        2: "not an image-caption pair",
    }


def test_rows_are_found_in_their_shards(tmp_path: Path, make_shard: MakeShard, tokenizer_dir: Path) -> None:
    for number, count in enumerate((3, 1, 4)):
        make_shard(
            tmp_path / f"{number}.tar", [{"json": json.dumps({"text": f"{number}-{n}"}).encode()} for n in range(count)]
        )
    source = Corpus.open({"a": SourceSettings([f"{tmp_path}/*.tar"])}, tokenizer_dir, toy_resolution()).sources["a"]
    assert len(source) == 8
    reader = ShardReader()
    found = [json.loads(reader.read(*source.locate(row))[1]["json"])["text"] for row in range(8)]
    assert found == ["0-0", "0-1", "0-2", "1-0", "2-0", "2-1", "2-2", "2-3"]
    assert source.ref(4).key == sample_key(0)
    assert Path(source.ref(4).shard).name == "2.tar"
