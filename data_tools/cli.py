"""The command ``keye-data``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from data_tools import check, fit_cost_cmd, index_cmd, ingest, ledger_cmd, plan_cmd, requeue_cmd, stats, view_cmd
from data_tools.demo import cli as demo

DESCRIPTION = """\
Make, check and describe the shards that keye-train reads.

A shard is a WebDataset .tar. Files that share a name up to the first dot are one sample:

  000017.json  {"messages": [{"role": "user", "content": [{"type": "image", "image": "0.jpg"},
                                                          {"type": "text", "text": "What is this?"}]},
                             {"role": "assistant", "content": "A lighthouse."}], "task": "vqa"}
  000017.0.jpg

Image + caption pairs (.jpg + .txt, or .jpg + .json with "caption") and pure text (.txt) are read as well. Training
needs an index beside each shard, because it plans every step before it opens a shard.
"""
EXAMPLES = """\
examples:
  keye-data ingest photos.parquet --out data/photos --tokenizer models/keye --image-column image --text-column caption
  keye-data index 'data/*.tar' --tokenizer models/keye --workers 8
  keye-data check 'data/*.tar'
  keye-data stats 'data/*.tar'
  keye-data plan stage=2_multitask model=tiny data=demo world_size=2 out=plan.html
  keye-data view stage=2_multitask model=tiny data=demo out=view.html
  keye-data ledger runs/2_multitask
  keye-data fit-cost runs/2_multitask --out cost.json
  keye-data demo --out data/demo

`keye-data COMMAND --help` tells more about a command.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = argparse.ArgumentParser(
        "keye-data", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--verbose", action="store_true", help="log more")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (ingest, index_cmd, check, stats, plan_cmd, view_cmd, ledger_cmd, requeue_cmd, fit_cost_cmd, demo):
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``keye-data``."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if arguments.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    try:
        sys.exit(arguments.run(arguments))
    except (ValueError, OSError) as error:
        sys.exit(f"keye-data: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
