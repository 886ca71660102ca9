"""Reading packs back in pieces: their sealed tables, and runs of their chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from stashcordfs.store.pack import HEADER, read_table, table_bytes
from stashcordfs.store.sealing import open_many

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from stashcordfs.crypto.keys import VolumeKeys
    from stashcordfs.store.api import ObjectStore
    from stashcordfs.store.pack import Table
    from stashcordfs.types import ChunkRef, Location, ObjectId

RANGE_BYTES = 8 << 20
_TAIL_BYTES = 64 << 10
Key = TypeVar("Key")


async def fetch_table(
    store: ObjectStore, keys: VolumeKeys, object_id: ObjectId, at: Location
) -> tuple[Table, int]:
    """A pack's table and the epoch that sealed it. StoreError when it cannot be had.

    Two ranges, three when the table is long.
    """
    size = at.size_bytes
    tail = await store.fetch(at, max(0, size - _TAIL_BYTES), min(size, _TAIL_BYTES))
    need = table_bytes(tail, size)
    if need > len(tail):
        tail = await store.fetch(at, size - need, need)
    header = tail if len(tail) == size else await store.fetch(at, 0, HEADER.size)
    table = read_table(keys, object_id, header[: HEADER.size], tail, size)
    epoch: int = HEADER.unpack(header[: HEADER.size])[3]
    return table, epoch


async def fetch_chunks(
    store: ObjectStore, keys: VolumeKeys, at: Location, refs: Sequence[ChunkRef]
) -> list[bytes]:
    """The plaintexts of chunks of one pack that one range covers. StoreError, CryptoError."""
    start, last = refs[0].offset, refs[-1]
    view = memoryview(await store.fetch(at, start, last.offset + last.length - start))
    return await open_many(
        keys, [(r, view[r.offset - start : r.offset - start + r.length]) for r in refs]
    )


def runs(
    chunks: Iterable[tuple[Key, ChunkRef]], *, gap_bytes: int = RANGE_BYTES
) -> Iterator[list[tuple[Key, ChunkRef]]]:
    """Chunks of one pack that one range fetches, in the pack's order.

    `gap_bytes`: what is fetched along, so that fewer ranges are asked for.
    """
    run: list[tuple[Key, ChunkRef]] = []
    end = 0
    for item in sorted(chunks, key=lambda item: item[1].offset):
        ref = item[1]
        far = ref.offset - end > gap_bytes
        if run and (far or ref.offset + ref.length - run[0][1].offset > RANGE_BYTES):
            yield run
            run = []
        run.append(item)
        end = ref.offset + ref.length
    if run:
        yield run
