"""Promise: where shards lie changes nothing in what is read, and a storage that fails never eats a sample.

The object store is moto's S3 server, the web server is one of the standard library: real requests, to loopback only.
"""

from __future__ import annotations

import logging
import os
import random
import select
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import fsspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_shards import mixed_samples, picture, toy_settings

from data_tools.cli import main
from data_tools.shards import sample_key, write_shard
from keye_train.data.cache import ShardCache
from keye_train.data.cost import PackCost
from keye_train.data.index import tokenizer_fingerprint
from keye_train.data.indexing import build_index
from keye_train.data.loader import Loader
from keye_train.data.opening import open_header
from keye_train.data.paths import find_shards, index_file, index_path
from keye_train.data.plan import Plan
from keye_train.data.reader import ShardReader, merge_ranges, offsets_path
from keye_train.data.storage import Storage, StorageError
from keye_train.model.sample_encoder import SampleEncoder
from keye_train.settings import SettingsError, SourceSettings, StorageSettings

MakeShard = Callable[..., Path]
NETWORK = StorageSettings(allow_network=True, backoff_s=0.0, attempts=3)
NEEDED = "pip install 'keye_train[s3,test]'"


# ------------------------------------------------------------------------------------------------- many small looks


@pytest.mark.parametrize("wait_s", [0.0, 0.0005])
def test_threads_are_taken_only_where_there_is_something_to_wait_for(wait_s: float) -> None:
    threads = set()

    def look(item: int) -> int:
        threads.add(threading.get_ident())
        if wait_s:
            select.select([], [], [], wait_s)  # a disk or a network that answers later
        return item * item

    files = Storage(StorageSettings(connections=4))
    assert files.map_quick(look, range(200)) == [item * item for item in range(200)]
    assert (threads == {threading.get_ident()}) == (wait_s == 0)
    files.close()


def test_remote_items_are_asked_for_at_once(tmp_path: Path) -> None:
    """From the first on: with a storage that takes 200 ms to answer, a start would wait a second for five of them."""
    both_ask = threading.Barrier(2, timeout=250)
    files = Storage(StorageSettings(connections=2))
    files.map_quick(lambda _: both_ask.wait(), range(2), remote=True)
    files.close()
    assert files.is_remote("s3://bucket/a.tar")
    assert not files.is_remote(f"{tmp_path}/a.tar")
    assert Storage(StorageSettings(index_dir="s3://bucket/indexes")).is_remote(f"{tmp_path}/a.tar")


def test_what_waits_for_the_storage_may_ask_it_for_more() -> None:
    """As a file of sizes behind a URL does, of which several parts are wanted."""
    files = Storage(StorageSettings(connections=2))
    assert files.map(lambda item: files.map(lambda more: item + more, [0, 1]), range(50)) == [
        [item, item + 1] for item in range(50)
    ]
    files.close()


# --------------------------------------------------------------------------------------------------- byte ranges

RANGES = st.lists(
    st.tuples(st.integers(0, 200), st.integers(1, 30)).map(lambda pair: (pair[0], sum(pair))), max_size=12
)


@given(RANGES, st.integers(0, 20), st.integers(1, 80))
@settings(max_examples=100, deadline=None)
def test_merged_ranges_cover_each_range_and_little_else(ranges: list[tuple[int, int]], gap: int, limit: int) -> None:
    merged = merge_ranges(ranges, gap, limit)
    assert merged == sorted(merged)
    for start, end in ranges:
        assert any(first <= start and end <= last for first, last in merged)
    wanted = {byte for start, end in ranges for byte in range(start, end)}
    for first, last in merged:
        assert {first, last} <= {edge for bounds in ranges for edge in bounds}
        missing = 0  # never more than the gap is read for nothing in one piece
        for byte in range(first, last):
            missing = 0 if byte in wanted else missing + 1
            assert missing <= gap
    for (first, last), (start, end) in pairwise(merged):
        assert last <= start
        assert start - last > gap or end - first > limit  # else they would be one


def test_samples_of_a_step_are_read_in_any_order_and_number(tmp_path: Path, make_shard: MakeShard) -> None:
    shards = [str(make_shard(tmp_path / f"{number}.tar", mixed_samples(12, number))) for number in range(2)]
    places = [(shard, row) for shard in shards for row in range(12)]
    random.Random(0).shuffle(places)
    places.append(places[0])
    expected = [ShardReader().read(*place) for place in places]
    for gap in (0, 3000, 10**9):
        assert ShardReader(StorageSettings(merge_gap_bytes=gap)).read_many(places) == expected


def test_a_local_shard_that_was_cut_off_stops_the_run(tmp_path: Path, make_shard: MakeShard) -> None:
    shard = make_shard(tmp_path / "a.tar", [{"txt": b"x" * 3000}] * 3)
    os.truncate(shard, 5000)
    reader = ShardReader()
    assert reader.read(str(shard), 0)[1] == {"txt": b"x" * 3000}
    with pytest.raises(StorageError, match=r"a\.tar ends at byte 5000.*index it again"):
        reader.read(str(shard), 1)


# ------------------------------------------------------------------------------------------------------ patterns


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_brace_patterns_count_with_leading_zeros(first: int, more: int, digits: int) -> None:
    from braceexpand import braceexpand

    low, high = f"{first:0{digits}d}", f"{first + more:0{digits}d}"
    width = max(len(low), len(high)) if low.startswith("0") and len(low) > 1 else 0
    names = [f"s-{number:0{width}d}.tar" for number in range(first, first + more + 1)]
    assert list(braceexpand(f"s-{{{low}..{high}}}.tar", escape=False)) == names


def test_patterns_find_each_shard_once_in_order(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number:03d}.tar").touch()
    found = find_shards([f"{tmp_path}/{{009..011}}.tar", f"{tmp_path}/01*.tar", f"{tmp_path}/00[0-1].tar"])
    assert [Path(shard).stem for shard in found] == ["009", "010", "011", "000", "001"]
    with pytest.raises(ValueError, match=r"012\.tar does not exist"):
        find_shards([f"{tmp_path}/{{011..012}}.tar"])


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/a.tar", "s3://bucket/*.tar", "https://127.0.0.1:1/{0..1}.tar"])
def test_urls_are_not_touched_unless_the_recipe_allows_it(url: str) -> None:
    with pytest.raises(SettingsError, match=r"set data\.storage\.allow_network=true"):
        find_shards([url])
    with pytest.raises(SettingsError, match="chained"):
        find_shards([f"simplecache::{url}"], NETWORK)
    with pytest.raises(SettingsError, match="no file system is known"):
        find_shards(["nosuch://bucket/a.tar"], NETWORK)


# ----------------------------------------------------------------------------------------------------- an S3 store


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """URL of an empty bucket."""
    pytest.importorskip("s3fs", reason=NEEDED)
    server_module = pytest.importorskip("moto.server", reason=NEEDED)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        fsspec.filesystem("s3").mkdir("shards")
        yield "s3://shards"
    server.stop()
    fsspec.filesystem("s3").clear_instance_cache()


def upload(source: Path, target: str) -> None:
    fsspec.filesystem("s3").pipe_file(target, source.read_bytes())


@pytest.fixture(scope="module")
def remote(bucket: str, tmp_path_factory: pytest.TempPathFactory, make_shard: MakeShard) -> tuple[Path, str]:
    """Folder and URL of the same two shards with indexes."""
    folder = tmp_path_factory.mktemp("local")
    for number in range(2):
        shard = make_shard(folder / f"{number}.tar", mixed_samples(24, number))
        for path in (shard, index_path(shard), offsets_path(shard)):
            upload(path, f"{bucket}/toy/{path.name}")
    return folder, f"{bucket}/toy"


TOY_COST = PackCost(token=50.0, token_squared=1.0, patch=1.0, patch_squared=0.0)


def read_packs(pattern: str, tokenizer_dir: Path, storage: StorageSettings, workers: int) -> list[tuple]:
    """All that packs hold but the paths of their shards, in order."""
    run = toy_settings({"a": SourceSettings([pattern])}, tokenizer_dir, workers=workers, steps=3, storage=storage)
    run.data.mixtures = {"mix": {"a": 1.0}}
    plan = Plan.from_settings(run, TOY_COST)
    with Loader(plan, SampleEncoder.from_settings(run.model, run.data.resolution), 0, 1, run) as loader:
        packs = [pack for step in loader for pack in step.packs]
    return [([ref.key for ref in pack.refs], pack.skipped, pack.inputs) for pack in packs]


def test_packs_are_the_same_from_disk_store_and_cache_at_any_number_of_readers(
    remote: tuple[Path, str], tokenizer_dir: Path, tmp_path: Path
) -> None:
    folder, url = remote
    expected = read_packs(f"{folder}/*.tar", tokenizer_dir, StorageSettings(), 0)
    assert len(expected) == 12
    cached = replace(NETWORK, cache_dir=str(tmp_path / "cache"))
    tiny = replace(cached, cache_bytes=1000)  # no shard fits
    for storage, workers in ((NETWORK, 0), (NETWORK, 1), (cached, 2), (cached, 0), (tiny, 0)):
        read = read_packs(f"{url}/{{0..1}}.tar", tokenizer_dir, storage, workers)
        for (keys, skipped, inputs), (read_keys, read_skipped, read_inputs) in zip(expected, read, strict=True):
            assert (keys, skipped) == (read_keys, read_skipped)
            assert torch.equal(inputs.input_ids, read_inputs.input_ids)
            assert torch.equal(inputs.labels, read_inputs.labels)
            assert torch.equal(inputs.vision.pixel_patches, read_inputs.vision.pixel_patches)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2
    assert not list((tmp_path / "cache").glob("*.part"))


def test_commands_work_on_a_store_with_the_index_beside_or_in_a_folder(
    remote: tuple[Path, str], bucket: str, tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = remote
    for number in range(2):
        upload(folder / f"{number}.tar", f"{bucket}/bare/{number}.tar")
    pattern, tokenizer = f"{bucket}/bare/*.tar", ["--tokenizer", str(tokenizer_dir), "--workers", "1"]
    shards = find_shards([pattern], NETWORK)
    assert shards == [f"{bucket}/bare/0.tar", f"{bucket}/bare/1.tar"]
    with pytest.raises(
        ValueError, match=r"has no index; run: keye-data index s3://shards/bare/0\.tar .*--allow-network"
    ):
        open_header(shards[0], tokenizer_dir, storage=NETWORK)

    def keye_data(*arguments: str) -> int:
        with pytest.raises(SystemExit) as caught:
            main([*arguments, "--allow-network"])
        assert isinstance(caught.value.code, int), caught.value.code
        return caught.value.code

    for place in ([], ["--index-dir", str(tmp_path)]):
        storage = replace(NETWORK, index_dir=place[1] if place else None)
        assert keye_data("index", pattern, *tokenizer, *place) == 0
        assert "indexed 2 shards with 48 samples; 0 were up to date" in capsys.readouterr().out
        index = Storage(storage).read(index_file(shards[0], storage))
        assert index == index_path(folder / "0.tar").read_bytes()
        assert keye_data("index", pattern, *tokenizer, *place) == 0
        assert "; 2 were up to date" in capsys.readouterr().out
        assert keye_data("stats", pattern, *place) == 0
        assert "2 shards, 48 samples, 48 of them usable" in capsys.readouterr().out
        assert keye_data("check", pattern, *place) == 0
    assert (tmp_path / "s3/shards/bare/0.tar.idx").is_file()
    fsspec.filesystem("s3").rm("shards/bare/0.tar.idx")  # what stands in the folder is enough
    open_header(shards[0], tokenizer_dir, storage=replace(NETWORK, index_dir=str(tmp_path)))


def test_a_shard_that_goes_away_stops_the_run(bucket: str, remote: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = remote
    for path in (folder / "0.tar", offsets_path(folder / "0.tar")):
        upload(path, f"{bucket}/gone/{path.name}")
    reader = ShardReader(NETWORK)
    reader.read(f"{bucket}/gone/0.tar", 0)
    fsspec.filesystem("s3").rm("shards/gone/0.tar")
    with pytest.raises(StorageError, match=r"gone/0\.tar is not there any more"):
        reader.read(f"{bucket}/gone/0.tar", 1)


# -------------------------------------------------------------------------------------------------- a web server


class FlakyHandler(BaseHTTPRequestHandler):
    """Serves files by range; fails the next ``server.failures`` requests with 503, or cuts their bodies short."""

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, head: bool) -> None:
        server = self.server
        server.requests += 1
        data = server.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        if server.failures and not server.short:
            server.failures -= 1
            self.send_error(503)
            return
        status, span = 200, self.headers.get("Range")
        if span:
            start, _, end = span.removeprefix("bytes=").partition("-")
            data, status = data[int(start) : int(end) + 1], 206
            server.fetched += not head
        if server.failures and not head:
            server.failures -= 1
            data = data[:-1]
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not head:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path, make_shard: MakeShard) -> Iterator[ThreadingHTTPServer]:
    pytest.importorskip("aiohttp", reason=NEEDED)
    shard = make_shard(tmp_path / "a.tar", mixed_samples(6))
    server = ThreadingHTTPServer(("127.0.0.1", 0), FlakyHandler)
    server.files = {f"/{path.name}": path.read_bytes() for path in (shard, index_path(shard), offsets_path(shard))}
    server.failures, server.short, server.requests, server.fetched = 0, False, 0, 0
    server.url = f"http://127.0.0.1:{server.server_address[1]}/a.tar"
    server.shard = shard
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("short", [False, True])
def test_faults_that_pass_are_waited_for(web: ThreadingHTTPServer, short: bool) -> None:
    reader, expected = ShardReader(NETWORK), ShardReader().read(str(web.shard), 3)
    assert reader.read(web.url, 3) == expected
    web.short, web.failures = short, 2
    assert reader.read(web.url, 3) == expected
    assert web.failures == 0


def test_faults_that_stay_stop_the_run_and_name_shard_and_setting(web: ThreadingHTTPServer) -> None:
    reader = ShardReader(NETWORK)
    reader.read(web.url, 0)
    web.failures, web.requests = 10**6, 0
    with pytest.raises(StorageError, match=r"a\.tar after 3 attempts \(data\.storage\.attempts\)"):
        reader.read_many([(web.url, 0)])
    assert web.requests == 3


def test_a_web_server_takes_no_index(
    web: ThreadingHTTPServer, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["index", web.url, "--allow-network", "--tokenizer", str(tokenizer_dir)])
    assert left.value.code == 2
    assert "give a folder for indexes with --index-dir" in capsys.readouterr().err
    assert web.fetched == 0


# ------------------------------------------------------------------------------------------------------ the cache


def fetch(url: str, storage: StorageSettings, times: int) -> list[int]:
    """Read a shard through the cache again and again; its checksums."""
    cache = ShardCache(Storage(storage))
    found = []
    for _ in range(times):
        descriptor = cache.open(url)
        assert descriptor is not None
        found.append(hash(os.pread(descriptor, 10**7, 0)))
        os.close(descriptor)
    return found


def test_processes_of_a_node_fetch_a_shard_once(web: ThreadingHTTPServer, tmp_path: Path) -> None:
    storage = replace(NETWORK, cache_dir=str(tmp_path / "cache"))
    code = (
        "import os, sys; from keye_train.data.cache import ShardCache; from keye_train.data.storage import Storage\n"
        "from keye_train.settings import StorageSettings\n"
        f"cache = ShardCache(Storage(StorageSettings(**{vars(storage)!r})))\n"
        "for _ in range(3):\n"
        f"    descriptor = cache.open({web.url!r})\n"
        "    sys.stdout.buffer.write(os.pread(descriptor, 10**7, 0)); os.close(descriptor)\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(3)]
    for process in processes:
        assert process.communicate(timeout=250)[0] == web.files["/a.tar"] * 3
    # Each process looks the shard up, and the one that fetches it once more; its bytes went over the wire once.
    assert web.fetched == 1
    assert [path.suffix for path in (tmp_path / "cache").iterdir() if path.stat().st_size] == [".tar"]


def test_the_cache_keeps_its_limit_and_forgets_what_was_used_longest_ago(
    web: ThreadingHTTPServer, tmp_path: Path
) -> None:
    size = len(web.files["/a.tar"])
    urls = [web.url.replace("a.tar", f"{name}.tar") for name in "abc"]
    for name in "bc":
        web.files[f"/{name}.tar"] = web.files["/a.tar"]
    storage = replace(NETWORK, cache_dir=str(tmp_path / "cache"), cache_bytes=int(2.5 * size))
    cache = ShardCache(Storage(storage))
    folder = tmp_path / "cache"

    def copies() -> set[str]:
        return {path.name for path in folder.glob("*.tar")}

    kept: dict[str, str] = {}
    held = -1
    for moment, letter in enumerate("abac"):
        before = copies()
        descriptor = cache.open(urls["abc".index(letter)])
        assert descriptor is not None
        kept.update(dict.fromkeys([letter], *(copies() - before)) if copies() - before else {})
        os.utime(folder / kept[letter], (moment, moment))
        if letter == "b":
            held = descriptor
        else:
            os.close(descriptor)
        assert sum(path.stat().st_size for path in folder.iterdir()) <= storage.cache_bytes
    assert copies() == {kept["a"], kept["c"]}
    assert os.pread(held, size, 0) == web.files["/a.tar"]  # whoever had it open reads on
    os.close(held)
    assert ShardCache(Storage(replace(storage, cache_bytes=size - 1))).open(urls[0]) is None


def test_a_process_that_dies_while_fetching_leaves_no_copy_and_no_lock(
    web: ThreadingHTTPServer, tmp_path: Path
) -> None:
    storage = replace(NETWORK, cache_dir=str(tmp_path / "cache"), cache_bytes=len(web.files["/a.tar"]))
    code = (
        "import os, signal; from keye_train.data.cache import ShardCache; from keye_train.data.storage import Storage\n"
        "from keye_train.settings import StorageSettings\n"
        "storage = Storage(StorageSettings(**" + repr(vars(storage)) + "))\n"
        "class Dies(type(storage)):\n"
        "    def download(self, path, target):\n"
        "        target.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "storage.__class__ = Dies\n"
        f"ShardCache(storage).open({web.url!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False, timeout=250)
    assert [path.suffix for path in (tmp_path / "cache").iterdir() if path.stat().st_size] == [".part"]
    assert len(set(fetch(web.url, storage, 2))) == 1
    assert [path.suffix for path in (tmp_path / "cache").iterdir() if path.stat().st_size] == [".tar"]


# ------------------------------------------------------------------------------------------------------- settings


def test_an_index_folder_keeps_shards_of_one_name_apart(
    tmp_path: Path, tokenizer: object, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = StorageSettings(index_dir=str(tmp_path / "indexes"))
    for name in ("one", "two"):
        shard = tmp_path / name / "a.tar"
        write_shard(shard, [(sample_key(0), {"txt": name.encode(), "jpg": picture(30, 30)})])
        build_index(shard, tokenizer, tokenizer_fingerprint(tokenizer_dir), storage)
        assert sorted(path.name for path in shard.parent.iterdir()) == ["a.tar"]
    monkeypatch.chdir(tmp_path / "two")
    for shard in (str(tmp_path / "one/a.tar"), "a.tar"):
        open_header(shard, tokenizer_dir, storage=storage)
        expected = b"two" if shard == "a.tar" else b"one"
        assert ShardReader(storage).read(shard, 0)[1]["txt"] == expected


def test_tar_headers_are_read_as_tarfile_reads_them(tmp_path: Path) -> None:
    """The plain ones, which are read here, and all others in between."""
    from keye_train.data.tar import walk_shard

    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / "a.tar"
        pax = {"comment": "for all"} if form == tarfile.PAX_FORMAT else None
        with tarfile.open(path, "w", format=form, pax_headers=pax) as tar:
            for number, name in enumerate(["a.txt", "dir/b.txt", f"{'p' * 90}/{'n' * 60}.txt", "ü.txt", "e.txt"]):
                source = tmp_path / "content"
                source.write_bytes(b"x" * 700 * number)
                tar.add(source, name)
            tar.add(tmp_path, "folder", recursive=False)
            tar.add(source, "last.txt")
        with tarfile.open(path) as tar:
            expected = [(m.name, tar.extractfile(m).read()) for m in tar if m.isreg()]
        raws = list(walk_shard(path))
        assert [raw.error for raw in raws] == [None] * 6
        read = [(f"{raw.key}.txt", raw.members["txt"]) for raw in raws]
        assert read == expected
