"""``keye-data ingest``: tables with images and texts -> shards with an index."""

from __future__ import annotations

import argparse
import io
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from PIL import Image
from tqdm import tqdm

from data_tools.index_cmd import index_shards
from data_tools.shards import remove_shard, sample_key, write_shards, written_shards
from keye_train.data.index import tokenizer_fingerprint

log = logging.getLogger(__name__)

DESCRIPTION = """\
Turn a table into shards and index them. The table is a Hugging Face dataset saved by save_to_disk, a .parquet, a .json
or a .jsonl file, or a folder of such files. Images may be stored in it or named by paths (relative to the table).

Columns:
  --image-column     one image or a list of images
  --text-column      caption of the image; without images, pure text
  --messages-column  a whole conversation instead: [{"role": ..., "content": ...}, ...]. In a content list the part
                     {"type": "image"} stands for the next image of the row
All other columns that JSON can hold are kept in the sample, e.g. an answer to score against.
"""
EXAMPLES = """\
examples:
  keye-data ingest captions.parquet --out data/captions --tokenizer models/keye --text-column caption
  keye-data ingest chats.jsonl --out data/chats --tokenizer models/keye --messages-column messages --task vqa
  keye-data ingest saved_dataset --out data/ocr --tokenizer models/keye --text-column text --task ocr
"""


@dataclass(frozen=True)
class Columns:
    """Which columns of the table mean what."""

    image: str = "image"
    text: str | None = None
    messages: str | None = None
    task: str | None = None  # the task itself, not a column


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``ingest``."""
    parser = subparsers.add_parser(
        "ingest",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", type=Path, help="saved dataset, file, or folder of files")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the shards")
    parser.add_argument("--tokenizer", required=True, type=Path, metavar="DIR", help="tokenizer for the index")
    parser.add_argument("--name", default="shard", help="start of the names of the shards (%(default)s)")
    parser.add_argument("--image-column", default="image", metavar="COLUMN", help="(%(default)s)")
    parser.add_argument("--text-column", metavar="COLUMN", help="caption or pure text")
    parser.add_argument("--messages-column", metavar="COLUMN", help="conversation")
    parser.add_argument("--task", help="label of the samples in logs and scores")
    parser.add_argument("--split", default="train", help="split of a saved DatasetDict (%(default)s)")
    parser.add_argument("--shard-samples", type=int, default=10_000, metavar="N", help="at most (%(default)s)")
    parser.add_argument("--shard-mb", type=int, default=1000, metavar="MB", help="at most (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards NAME-NUMBER.tar that --out has")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that index (%(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Ingest and tell; the exit status."""
    columns = Columns(arguments.image_column, arguments.text_column, arguments.messages_column, arguments.task)
    if min(arguments.shard_samples, arguments.shard_mb) < 1 or arguments.workers < 0:
        raise ValueError("--shard-samples and --shard-mb are at least 1, --workers at least 0")
    tokenizer_fingerprint(arguments.tokenizer)  # a wrong folder is told before the work, not after it
    table = open_table(arguments.table, arguments.split)
    check_columns(table, columns)
    before = written_shards(arguments.out, arguments.name)
    if before and not arguments.overwrite:
        raise ValueError(
            f"{arguments.out} has {len(before)} shards {arguments.name}-NUMBER.tar, which would stand beside the new "
            "ones: give another --out or --name, or --overwrite to replace them"
        )
    base = arguments.table if arguments.table.is_dir() else arguments.table.parent
    samples = table_samples(table, columns, base)
    shown = tqdm(samples, total=len(table), unit="sample", desc="ingest")
    shards = list(
        write_shards(arguments.out, arguments.name, shown, arguments.shard_samples, arguments.shard_mb * 1_000_000)
    )
    for stale in before - {shard.path for shard in shards}:
        remove_shard(stale)
    paths = [str(shard.path) for shard in shards]
    headers = list(
        tqdm(index_shards(paths, arguments.tokenizer, arguments.workers), total=len(paths), unit="shard", desc="index")
    )
    print(f"{sum(header.rows for header in headers)} samples in {len(headers)} shards of {arguments.out}")
    return 0


def open_table(path: Path, split: str) -> datasets.Dataset:
    """Open a table from local files; nothing is fetched.

    Raises:
        ValueError: it is none of the accepted kinds.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        loaded = datasets.load_from_disk(str(path))
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if split not in loaded:
            raise ValueError(f"{path} has no split '{split}': use --split with one of {list(loaded)}")
        return loaded[split]
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for builder, suffixes in (("parquet", (".parquet",)), ("json", (".json", ".jsonl"))):
        mine = [str(file) for file in files if file.suffix in suffixes]
        if mine:
            return datasets.load_dataset(builder, data_files=mine, split="train")
    raise ValueError(f"{path}: no saved dataset, .parquet, .json or .jsonl there")


def check_columns(table: datasets.Dataset, columns: Columns) -> None:
    """Raise ValueError where columns are missing or contradict each other."""
    if (columns.text is None) == (columns.messages is None):
        raise ValueError(f"give --text-column or --messages-column, one of {table.column_names}")
    wanted = columns.text or columns.messages
    if wanted not in table.column_names:
        raise ValueError(f"the table has no column '{wanted}'; columns: {table.column_names}")
    if columns.image != Columns.image and columns.image not in table.column_names:
        raise ValueError(f"the table has no column '{columns.image}'; columns: {table.column_names}")


def table_samples(table: datasets.Dataset, columns: Columns, base: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of each row.

    Raises:
        ValueError: a row does not have what its columns promise; the message names it.
    """
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))  # bytes go into the shard as they are
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            table = table.cast_column(name, datasets.List(datasets.Image(decode=False)))
    for number, row in enumerate(table):
        try:
            yield sample_key(number), row_members(row, columns, base)
        except (ValueError, OSError) as error:
            raise ValueError(f"row {number}: {error}") from error


def row_members(row: Mapping[str, Any], columns: Columns, base: Path) -> dict[str, bytes]:
    """Members of one sample.

    Raises:
        ValueError: an image has no bytes, text is no text, or placeholders and images differ in number.
        OSError: an image file cannot be read, or is no image.
    """
    media = {}
    for number, image in enumerate(_images(row.get(columns.image))):
        data = _image_bytes(image, base)
        media[f"{number}.{_suffix(data)}"] = data
    if columns.messages is not None:
        messages = _fill_placeholders(row[columns.messages], list(media))
    else:
        text = row[columns.text or ""]
        if not isinstance(text, str):
            raise ValueError(f"column '{columns.text}' holds {type(text).__name__}, expected a string")
        messages = [{"role": "assistant", "content": text}]
        if media:
            parts = [{"type": "image", "image": name} for name in media]
            messages.insert(0, {"role": "user", "content": parts})
    used = {columns.image, columns.text, columns.messages}
    record = {name: value for name, value in row.items() if name not in used and _is_json(value)}
    record["messages"] = messages
    default_task = "chat" if columns.messages else "caption" if media else "text"
    record["task"] = columns.task or record.get("task") or default_task
    return {"json": json.dumps(record, ensure_ascii=False).encode(), **media}


def _images(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _image_bytes(image: Any, base: Path) -> bytes:
    """Bytes of an image given as {"bytes", "path"}, as bytes, or as a path."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str):
        raise ValueError(f"an image is {type(image).__name__}, expected bytes or a path")
    return (base / image).read_bytes()


def _suffix(data: bytes) -> str:
    """Ending for the bytes of an image, from what they are and not from what they are called.

    Raises:
        OSError: no image.
    """
    with Image.open(io.BytesIO(data)) as image:
        return {"JPEG": "jpg"}.get(image.format or "", (image.format or "").lower())


def _fill_placeholders(messages: Any, names: list[str]) -> list[dict[str, Any]]:
    """The conversation with the names of the images in place of ``{"type": "image"}``, in order."""
    if isinstance(messages, str):
        messages = json.loads(messages)
    waiting = iter(names)
    filled = []
    if not isinstance(messages, list):
        raise ValueError(f"the conversation is {type(messages).__name__}, expected a list of messages")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"message {message!r:.80} has no role and content")
        content = message["content"]
        if isinstance(content, list):
            content = [_fill_part(part, waiting) for part in content]
        filled.append({"role": message["role"], "content": content})
    left = len(list(waiting))
    if left:
        raise ValueError(f"{left} of {len(names)} images have no place in the conversation")
    return filled


def _fill_part(part: Mapping[str, Any], waiting: Iterator[str]) -> dict[str, Any]:
    if not isinstance(part, Mapping) or "type" not in part or (part["type"] != "image" and part["type"] not in part):
        raise ValueError(f'part {part!r:.80} of a message is no {{"type": KIND, KIND: ...}}')
    if part["type"] != "image":
        return {"type": part["type"], part["type"]: part[part["type"]]}
    name = next(waiting, None)
    if name is None:
        raise ValueError("the conversation has more places for images than the row has images")
    return {"type": "image", "image": name}


def _is_json(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_json(item) for item in value)
    return value is not None and isinstance(value, str | int | float | bool)
