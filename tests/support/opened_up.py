"""All that attachments hold, for whoever has the keys: what a search for a purged file reads."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from stashcordfs.crypto.keys import (
    KIND_CHECKPOINT,
    KIND_CLAIM,
    KIND_MANIFEST,
    KIND_PACK,
    KIND_SEGMENT,
    VolumeKeys,
    object_id_of,
)
from stashcordfs.store import table as tables
from stashcordfs.store.checkpoint import decode_manifest, expand_to
from stashcordfs.store.pack import HEADER, open_chunk, read_table
from stashcordfs.store.sealed import open_object


def open_up(attachments: Iterable[tuple[str, bytes]], keys: VolumeKeys) -> dict[str, bytes]:
    """What is in clear, or sealed, in attachments (name, bytes): tables, chunks, bodies, databases.

    Anything that cannot be opened raises: a search must not pass over it.
    """
    found: dict[str, bytes] = {}
    parts: dict[bytes, bytes] = {}
    manifests = []
    for at, (filename, data) in enumerate(attachments):
        object_id, name = object_id_of(filename), f"{at} {filename}"
        found[name] = data
        if object_id is None:
            continue
        kind, _ = keys.read_object_id(object_id)
        if kind == KIND_PACK:
            table = read_table(keys, object_id, data[: HEADER.size], data, len(data))
            found[f"{name} table"] = tables.encode(table)
            for ref in table.chunks:
                sealed = data[ref.offset : ref.offset + ref.length]
                found[f"{name} chunk {ref.number}"] = open_chunk(keys, ref, sealed)
            continue
        assert kind in (KIND_SEGMENT, KIND_CHECKPOINT, KIND_MANIFEST, KIND_CLAIM)
        body = found[f"{name} body"] = open_object(keys, kind, object_id, data)
        if kind == KIND_CHECKPOINT:
            parts[object_id] = body
        elif kind == KIND_MANIFEST:
            manifests.append((name, decode_manifest(body)))
    for name, manifest in manifests:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "copy"
            pieces = [parts[part.object_id] for part in manifest.parts]
            expand_to(copy, pieces, manifest.plain_bytes)
            found[f"{name} database"] = copy.read_bytes()
    return found


def holding(found: dict[str, bytes], *needles: bytes) -> list[str]:
    """Which of it holds one of the needles."""
    return [name for name, data in found.items() if any(needle in data for needle in needles)]
