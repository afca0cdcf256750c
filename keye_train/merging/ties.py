"""Models whose config.json ties the output matrix to the embedding: one matrix with two names.

Files hold it once or twice. Where they hold it twice with the same bytes, the second is dropped, and the result ties as
well. Where the bytes differ, the files say otherwise than config.json: only the user knows which of both is right.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from keye_train.merging.compatibility import OUTPUT_MATRIX, TIE, Difference, ties
from keye_train.merging.reading import ExportReader

_EMBEDDING = "embed_tokens.weight"


def drop_doubles(readers: Sequence[ExportReader]) -> list[Difference]:
    """Leave out the output matrix of each model that ties it and stores its embedding's bytes a second time.

    Reads both matrices of such models, up to the first difference.

    Returns:
        One difference of the kind "tied" for each model whose two matrices differ; both stay.
    """
    found = []
    for reader in readers:
        names = _stored_twice(reader)
        if names is None:
            continue
        output, embedding = names
        if _same_bytes(reader, output, embedding):
            reader.leave_out(output)
            continue
        left, right = reader.places[output], reader.places[embedding]
        found.append(
            Difference(
                "tied",
                f"{left.file}: {output} differs from {embedding} of {right.file.name}, but config.json ties them "
                f"({TIE}): set it to false there if both are meant, or remove {output}",
            )
        )
    return found


def untie(readers: Sequence[ExportReader]) -> list[Difference]:
    """Give models that tie output matrix and embedding both tensors, where others of the models hold two.

    Returns:
        One difference of the kind "tied" for each model that was changed.
    """
    tied = [(reader, embedding) for reader in readers if (embedding := _only_embedding(reader)) is not None]
    outputs = {name for reader in readers for name in reader.places if name.endswith(OUTPUT_MATRIX)}
    if not tied or len(tied) == len(readers) or len(outputs) != 1:
        return []
    (output,) = outputs
    changed = []
    for reader, embedding in tied:
        reader.add_alias(output, embedding)
        changed.append(Difference("tied", f"{reader.origin}: ties {output} to {embedding}, another model does not"))
    return changed


def _stored_twice(reader: ExportReader) -> tuple[str, str] | None:
    """Names of output matrix and embedding, of a model that ties them and stores both."""
    output = next((name for name in reader.places if name.endswith(OUTPUT_MATRIX)), None)
    embeddings = [name for name in reader.places if name.endswith(_EMBEDDING)]
    if output is None or not embeddings or not ties(reader):
        return None
    shape = reader.places[output].shape  # some models embed pictures or sound as well
    return output, min(embeddings, key=lambda name: reader.places[name].shape != shape)


def _only_embedding(reader: ExportReader) -> str | None:
    """Name of the embedding that a model uses as its output matrix too; None where it has an output matrix."""
    if any(name.endswith(OUTPUT_MATRIX) for name in reader.places) or not ties(reader):
        return None
    return next((name for name in reader.places if name.endswith(_EMBEDDING)), None)


def _same_bytes(reader: ExportReader, output: str, embedding: str) -> bool:
    left, right = reader.places[output], reader.places[embedding]
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    pairs = zip(reader.pieces(output), reader.pieces(embedding), strict=True)
    return all(torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in pairs)
