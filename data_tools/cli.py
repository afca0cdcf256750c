"""The command ``keye-data``."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from keye_train.command import guarded

COMMANDS = {
    "ingest": ("data_tools.ingest", "turn tables (Hugging Face datasets, parquet, json) into shards"),
    "index": ("data_tools.index_cmd", "write the index beside each shard"),
    "check": ("data_tools.check", "verify checksums and open every sample"),
    "stats": ("data_tools.stats", "count samples, tokens and patches"),
    "plan": ("data_tools.plan_cmd", "simulate a stage: fill, balance, sources, loader"),
    "view": ("data_tools.view_cmd", "a page of samples and packs as the model sees them"),
    "ledger": ("data_tools.ledger_cmd", "audit what became of every planned sample of a run"),
    "requeue": ("data_tools.requeue_cmd", "read quarantined samples again, as a source of their own"),
    "fit-cost": ("data_tools.fit_cost_cmd", "fit the cost of packs on the step times of a run"),
    "demo": ("data_tools.demo.cli", "compose the demo's corpus from real scans, photographs, clips and fonts"),
}
"""Command -> its module and its purpose. Only the module of the command asked for is imported."""

DESCRIPTION = """\
Make, check and describe the shards that keye-train reads.

A shard is a WebDataset .tar. Files that share a name up to the first dot are one sample:

  000017.json  {"messages": [{"role": "user", "content": [{"type": "image", "image": "0.jpg"},
                                                          {"type": "text", "text": "What is this?"}]},
                             {"role": "assistant", "content": "A lighthouse."}], "task": "vqa"}
  000017.0.jpg

Image + caption pairs (.jpg + .txt, or .jpg + .json with "caption"), LLaVA conversations, interleaved documents, videos
(.mp4), pure text (.txt) and folders prepared for megatron-energon are read as well; docs/data.md has the layouts.
Training needs an index beside each shard, because it plans every step before it opens a shard.
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

`keye-data COMMAND --help` tells more about a command. Exit status: 0; 1 where check, ledger or requeue found something
wrong; 2 for wrong words, settings or files, with the way to mend it.
"""


def build_parser(commands: Sequence[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """The parser; ``commands`` with their arguments, the others by name and purpose only."""
    parser = argparse.ArgumentParser(
        "keye-data", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--verbose", action="store_true", help="log more")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for command, (module, purpose) in COMMANDS.items():
        if command in commands:
            importlib.import_module(module).add_parser(subparsers)
        else:
            subparsers.add_parser(command, help=purpose)
    return parser


def _asked(words: Sequence[str]) -> Sequence[str]:
    """The command that the words name; none for the help, or for the error that lists all."""
    for word in words:
        if word in ("-h", "--help"):
            break
        if not word.startswith("-"):
            return [word] if word in COMMANDS else []
    return []


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``keye-data``."""
    words = sys.argv[1:] if argv is None else argv
    asked = _asked(words)

    def work() -> int:
        arguments = build_parser(asked).parse_args(words)  # imports the command, which takes seconds
        logging.basicConfig(
            level=logging.DEBUG if arguments.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
        )
        from tqdm.contrib.logging import logging_redirect_tqdm  # the command has imported it already

        with logging_redirect_tqdm():  # lines stand above a bar, not behind it
            return int(arguments.run(arguments))

    guarded(" ".join(["keye-data", *asked]), work, also=(OSError,))


if __name__ == "__main__":
    main()
