"""Options of the commands for shards that are not on this machine."""

from __future__ import annotations

import argparse

from keye_train.settings import StorageSettings


def add_storage_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``storage_from`` reads."""
    group = parser.add_argument_group("shards behind URLs (s3://, gs://, hf://, https://, ...)")
    group.add_argument("--allow-network", action="store_true", help="read them: data.storage.allow_network")
    group.add_argument(
        "--index-dir", metavar="DIR", help="local folder for the indexes: data.storage.index_dir (beside the shards)"
    )
    group.add_argument("--connections", type=int, default=8, metavar="N", help="reads at once (%(default)s)")


def storage_from(arguments: argparse.Namespace) -> StorageSettings:
    """The storage that the options mean.

    Raises:
        ValueError: no connection.
    """
    if arguments.connections < 1:
        raise ValueError(f"--connections {arguments.connections}: at least 1")
    return StorageSettings(
        allow_network=arguments.allow_network, index_dir=arguments.index_dir, connections=arguments.connections
    )
