"""What must hold of a journal, one generator a group; each yields what does not.

Namespace: `check_inodes`, `check_names`, `check_reach`. Data: `check_chunk_lists`, `check_chunks`,
`check_packs`. This machine: `check_local`. Every query walks one table in slices of its key and
looks the rest up by index, so that a million files neither fill the memory nor block the reader.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from stashcordfs.crypto.keys import object_filename
from stashcordfs.journal.rules import NAME_MAX
from stashcordfs.journal.sqlite.inspection import Fault, readable
from stashcordfs.types import DAMAGED_CHUNK, ROOT_INO, ObjectId

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stashcordfs.journal.sqlite.inspection import Inspection

FORMAT_MASK = stat.S_IFMT(0o170000)
KINDS = (
    stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR,
    stat.S_IFBLK,
)  # fmt: skip
MAX_SIZE = 1 << 62
_HEADER_BYTES, _TAG_BYTES = 24, 16  # docs/format.md: a pack's header, a chunk's tag
_MAX_PLAIN = 64 << 20
_FIRST_COOKIE = 16
_BATCH = 2000

IS_FOLDER = f"(mode & {FORMAT_MASK}) = {stat.S_IFDIR}"
BAD_NAME = (
    f"(typeof(name) != 'blob' OR length(name) NOT BETWEEN 1 AND {NAME_MAX}"
    " OR instr(name, x'2f') OR instr(name, x'00') OR name IN (x'2e', x'2e2e'))"
)
BAD_TRASH = (
    f"(i.ino IS NULL OR i.nlink != 0 OR typeof(t.deleted_ns) != 'integer' OR t.lost < 0"
    f" OR {BAD_NAME.replace('name', 't.name')}"
    f" OR (i.mode & {FORMAT_MASK}) NOT IN ({stat.S_IFREG}, {stat.S_IFDIR}))"
)
COUNTED = ("mode", "nlink", "uid", "gid", "rdev", "size", "atime_ns", "mtime_ns", "ctime_ns")
BAD_INODE = (
    "("
    + " OR ".join(f"typeof({column}) != 'integer'" for column in (*COUNTED, "stored"))
    + f" OR (mode & {FORMAT_MASK}) NOT IN ({','.join(map(str, KINDS))})"
    f" OR nlink < 0 OR size NOT BETWEEN 0 AND {MAX_SIZE} OR stored < 0)"
)

_INODES = f"""
SELECT i.ino, i.mode, i.nlink, i.size, i.stored,
  (SELECT count(*) FROM dirents d INDEXED BY dirents_ino WHERE d.ino = i.ino),
  CASE WHEN {IS_FOLDER} THEN (SELECT count(*) FROM dirents d CROSS JOIN inodes s ON s.ino = d.ino
    WHERE d.parent = i.ino AND (s.mode & {FORMAT_MASK}) = {stat.S_IFDIR}) ELSE 0 END,
  (SELECT coalesce(sum(l.valid_length), 0) FROM chunk_list l WHERE l.ino = i.ino),
  (SELECT length(t.target) FROM symlinks t WHERE t.ino = i.ino)
FROM inodes i WHERE i.ino BETWEEN ?1 AND ?2
"""


def check_inodes(look: Inspection) -> Iterator[Fault]:
    """Values, link counts, stored bytes, names, link targets; numbers not given yet."""
    root = next(look.rows(f"SELECT {IS_FOLDER} FROM inodes WHERE ino = ?", (ROOT_INO,)), None)
    if root is None or not root[0]:
        yield Fault("root", "the root folder is missing")
    bad = f"SELECT ino FROM inodes WHERE ino BETWEEN ?1 AND ?2 AND {BAD_INODE}"
    damaged = set()
    for (ino,) in look.sliced("inodes", bad):
        damaged.add(ino)
        yield Fault("inode-values", f"{look.path(ino)}: its inode has values that cannot be")
    for row in look.sliced("inodes", _INODES):
        if row[0] not in damaged:
            yield from _check_inode(look, row)
    highest = look.number("SELECT max(ino) FROM inodes")
    yield from _check_counter(look, "next_ino", highest)


def _check_inode(look: Inspection, row: tuple[int, ...]) -> Iterator[Fault]:
    ino, mode, nlink, size, stored, names, subfolders, listed, target = row
    if stat.S_ISDIR(mode):
        yield from _check_folder(look, ino, nlink, names, subfolders)
    elif nlink and not names:
        yield Fault("orphan", f"inode {ino} ({size} bytes) has lost its name")
    elif nlink != names:
        text = f"{look.path(ino)}: has {names} names, its inode counts {nlink}"
        yield Fault("links", text)
    if stored != listed:
        text = f"{look.path(ino)}: {listed} bytes in its chunk list, its inode counts {stored}"
        yield Fault("stored", text)
    if stat.S_ISLNK(mode) and target != size:
        yield Fault("link-target", f"{look.path(ino)}: a symbolic link without its right target")


def _check_folder(
    look: Inspection, ino: int, nlink: int, names: int, subfolders: int
) -> Iterator[Fault]:
    if ino != ROOT_INO:
        if nlink and not names:
            yield Fault("orphan", f"inode {ino}, a folder, has lost its name")
        if names > 1:
            yield Fault("folder-names", f"{look.path(ino)}: the folder has {names} names")
    if (nlink or names) and nlink != 2 + subfolders:
        text = f"{look.path(ino)}: has {subfolders} subfolders, its inode counts {nlink - 2}"
        yield Fault("folder-links", text)


def first_number(look: Inspection, key: str) -> int:
    """What a counter gives first: inodes and rows carry the writer's epoch (engine.Counter)."""
    epoch = max(1, look.local("writer_epoch")) << 40
    return {"next_ino": epoch | 2, "next_id": epoch | _FIRST_COOKIE, "next_version": 1}[key]


def _check_counter(look: Inspection, key: str, highest: int) -> Iterator[Fault]:
    if (look.local(key) or first_number(look, key)) <= highest:
        yield Fault(
            "counters",
            f"{key}: {highest} is in use and was never given out: the journal is older than it "
            "should be, or its counter is damaged",
        )


def check_names(look: Inspection) -> Iterator[Fault]:
    """Every name is a valid one, in a folder, of an inode; its cookie is its own."""
    sql = f"""
    SELECT d.parent, d.name, d.ino, i.ino IS NULL, p.ino IS NULL OR NOT ({IS_FOLDER.replace("mode", "p.mode")}),
      p.nlink, {BAD_NAME.replace("name", "d.name")}, typeof(d.cookie) != 'integer' OR d.cookie < {_FIRST_COOKIE}
    FROM dirents d LEFT JOIN inodes i ON i.ino = d.ino LEFT JOIN inodes p ON p.ino = d.parent
    WHERE d.parent BETWEEN ?1 AND ?2 AND (i.ino IS NULL OR p.ino IS NULL OR p.nlink = 0
      OR NOT ({IS_FOLDER.replace("mode", "p.mode")}) OR {BAD_NAME.replace("name", "d.name")}
      OR typeof(d.cookie) != 'integer' OR d.cookie < {_FIRST_COOKIE})
    """  # noqa: E501
    for parent, name, ino, no_inode, no_folder, links, bad_name, bad_cookie in look.sliced(
        "dirents", sql
    ):
        what = f"'{readable(name)}' in {look.path(parent)}"
        if no_inode:
            yield Fault("name-inode", f"{what}: inode {ino} is missing")
        if no_folder:
            yield Fault("name-folder", f"{what}: inode {parent} is no folder")
        elif links == 0:
            yield Fault("name-folder", f"{what}: the folder was removed")
        if bad_name:
            yield Fault("name-valid", f"{what}: no valid name")
        if bad_cookie:
            yield Fault("cookies", f"{what}: has no valid place in its folder's order")
    twice = (
        "SELECT parent, cookie, count(*) FROM dirents INDEXED BY dirents_order"
        " WHERE parent BETWEEN ?1 AND ?2 GROUP BY parent, cookie HAVING count(*) > 1"
    )
    for parent, _, count in look.sliced("dirents", twice):
        yield Fault("cookies", f"{look.path(parent)}: {count} names at one place of its order")


def check_reach(look: Inspection) -> Iterator[Fault]:
    """A path from the root leads to every folder: else a rename made a ring, or lost a branch."""
    reach_folders(look)
    lost = f"""
    SELECT i.ino FROM inodes i WHERE i.ino BETWEEN ?1 AND ?2 AND {IS_FOLDER} AND i.nlink > 0
      AND i.ino NOT IN (SELECT ino FROM temp.reached)
      AND EXISTS (SELECT 1 FROM dirents d INDEXED BY dirents_ino WHERE d.ino = i.ino)
    """
    for (ino,) in look.sliced("inodes", lost):
        yield Fault("unreachable", f"inode {ino}, a folder: no path from the root leads to it")


def reach_folders(look: Inspection) -> None:
    """Fill the temporary table `reached` with every folder below the root, level by level."""
    run = look.run
    run("DROP TABLE IF EXISTS temp.reached")
    run("CREATE TEMP TABLE reached (ino INTEGER NOT NULL PRIMARY KEY, seen INTEGER NOT NULL)")
    run("CREATE INDEX temp.reached_open ON reached (ino) WHERE seen = 0")
    run("INSERT INTO temp.reached VALUES (?, 0)", (ROOT_INO,))
    while batch := [
        row[0] for row in look.rows(f"SELECT ino FROM temp.reached WHERE seen = 0 LIMIT {_BATCH}")
    ]:
        for ino in batch:
            run(
                "INSERT OR IGNORE INTO temp.reached SELECT d.ino, 0 FROM dirents d"
                f" CROSS JOIN inodes i ON i.ino = d.ino WHERE d.parent = ? AND {IS_FOLDER}",
                (ino,),
            )
            run("UPDATE temp.reached SET seen = 1 WHERE ino = ?", (ino,))


def check_trash(look: Inspection) -> Iterator[Fault]:
    """What is in the trash is there, and has no name."""
    odd = (
        "SELECT t.ino, i.ino IS NULL FROM trash t LEFT JOIN inodes i ON i.ino = t.ino"
        f" WHERE {BAD_TRASH}"
    )
    for ino, missing in look.rows(odd):
        text = "is missing" if missing else "has a name, or cannot be there"
        yield Fault("trash", f"inode {ino} in the trash {text}")


_LISTS = f"""
SELECT l.ino, l.idx, l.chunk, l.valid_length, i.ino, i.mode, i.size, i.nlink, c.id, c.plain_length,
       p.id, p.message
FROM chunk_list l LEFT JOIN inodes i ON i.ino = l.ino LEFT JOIN chunks c ON c.id = l.chunk
     LEFT JOIN packs p ON p.id = c.pack
WHERE l.ino BETWEEN ?1 AND ?2 AND (
  i.ino IS NULL OR (i.mode & {FORMAT_MASK}) != {stat.S_IFREG} OR c.id IS NULL OR p.id IS NULL
  OR p.message <= 0 OR typeof(l.valid_length) != 'integer' OR typeof(l.idx) != 'integer'
  OR l.idx < 0 OR l.valid_length < 0
  OR l.valid_length > min(c.plain_length, ?3) OR l.idx * ?3 + l.valid_length > i.size)
"""


def check_chunk_lists(look: Inspection, block_bytes: int) -> Iterator[Fault]:
    """Every entry belongs to a file, ends within it, and its chunk is in a confirmed pack."""
    for row in look.sliced("chunk_list", _LISTS, (block_bytes,)):
        ino, index, chunk, valid, there, mode, size, nlink, known, plain, pack, message = row
        what = f"{look.path(ino)}: block {index}"
        if there is None:
            yield Fault("blocks-of-nothing", f"{what}: the inode is missing")
        elif (mode & FORMAT_MASK) != stat.S_IFREG:
            yield Fault("blocks-of-nothing", f"{what}: not of a regular file")
        if chunk == DAMAGED_CHUNK:
            yield Fault("damaged", f"{what}: its content is lost", note=not nlink)
        elif known is None or pack is None:
            yield Fault("dangling", f"{what}: where its content lies is not known any more")
        elif message < 0:
            yield Fault("damaged", f"{what}: its content is missing on Discord")
        elif message == 0:
            yield Fault("dangling", f"{what}: refers to an upload that was never confirmed")
        elif not isinstance(valid, int) or not 0 <= valid <= min(plain, block_bytes) or index < 0:
            yield Fault("block-length", f"{what}: claims more than its chunk has")
        elif there is not None and index * block_bytes + valid > size:
            yield Fault("size", f"{what}: lies beyond the file's end at {size}")


_CHUNKS = """
SELECT c.pack, c.number, c.id, c.offset, c.length, c.plain_length, c.codec,
       typeof(c.chunk_id) = 'blob' AND length(c.chunk_id) = 32, p.size, p.filename
FROM chunks c INDEXED BY chunks_pack LEFT JOIN packs p ON p.id = c.pack
WHERE c.pack BETWEEN ?1 AND ?2 ORDER BY c.pack, c.number
"""


def misplaced_chunks(look: Inspection) -> Iterator[tuple[int, str, str]]:
    """Chunks (row, pack's name, why) that cannot lie where the journal says."""
    at_pack: object = None
    number, end = -1, _HEADER_BYTES
    for pack, place, row, offset, length, plain, codec, named, size, filename in look.sliced(
        "chunks", _CHUNKS
    ):
        if pack != at_pack:
            at_pack, number, end = pack, -1, _HEADER_BYTES
        why = ""
        values = (place, offset, length, plain, codec)
        if size is None:
            why = "its pack is missing"
        elif not named or not all(isinstance(value, int) for value in values):
            why = "its values cannot be"
        elif place <= number:
            why = "two chunks have one number"
        elif offset < end or offset + length > size:
            why = "it does not lie within its pack, after the chunk before"
        elif not _plausible(length, plain, codec):
            why = "its lengths do not fit together"
        if why:
            yield row, str(filename), why
        else:
            number, end = place, offset + length


def _plausible(length: int, plain: int, codec: int) -> bool:
    if not 0 <= plain <= _MAX_PLAIN:
        return False
    if codec == 0:
        return length == plain + _TAG_BYTES
    return codec == 1 and _TAG_BYTES < length < plain + _TAG_BYTES


def check_chunks(look: Inspection) -> Iterator[Fault]:
    """Chunks lie in their packs, one after the other, with lengths that can be."""
    for row, filename, why in misplaced_chunks(look):
        yield Fault("chunks", f"chunk {row} of pack {filename}: {why}")


BAD_PACK = (
    "(typeof(p.object_id) != 'blob' OR length(p.object_id) != 16 OR typeof(p.size) != 'integer'"
    f" OR p.size NOT BETWEEN {_HEADER_BYTES} AND {1 << 31} OR typeof(p.message) != 'integer'"
    " OR typeof(p.filename) != 'text' OR (p.message != 0 AND (p.channel <= 0 OR p.attachment < 0)))"
)


def check_packs(look: Inspection, newest_epoch: int | None) -> Iterator[Fault]:
    """Packs have an address and a size; what is not confirmed has its intent."""
    sql = f"""
    SELECT p.id, p.object_id, p.epoch, p.message, p.filename, {BAD_PACK}, i.pack
    FROM packs p LEFT JOIN intent_packs i ON i.intent IN (SELECT id FROM intents) AND i.pack = p.id
    WHERE p.id BETWEEN ?1 AND ?2
    """
    for row, object_id, epoch, message, filename, bad, intent in look.sliced("packs", sql):
        if bad:
            yield Fault("packs", f"pack {filename}: its values cannot be")
            continue
        if newest_epoch is not None and not 0 <= epoch <= newest_epoch:
            yield Fault("packs", f"pack {filename}: sealed with a key {epoch} that is not known")
        if message == 0 and intent is None:
            yield Fault("outbox", f"pack {filename}: neither confirmed nor on its way")
        if message == 0 and filename != object_filename(ObjectId(object_id)):
            yield Fault("packs", f"pack {filename} (row {row}): does not bear its own name")
    twice = (
        "SELECT filename FROM packs WHERE message > 0"
        " GROUP BY channel, message, attachment HAVING count(*) > 1"
    )
    for (filename,) in look.rows(twice):
        yield Fault("packs", f"pack {filename}: another one has the same address")
    highest = max(
        look.number(f"SELECT max({key}) FROM {table}")
        for key, table in (("id", "packs"), ("id", "chunks"), ("id", "intents"))
    )
    yield from _check_counter(look, "next_id", highest)


# Local rows of inodes that are no more: the next mount passes them over or drops them.
_LEFTOVERS = {
    "symlinks": "a link target",
    "xattrs": "an extended attribute",
    "dirty": "a block that is not on Discord",
    "cached": "a cached block",
    "generations": "a local file",
    "synced_sizes": "a synced size",
}


def check_local(look: Inspection, block_bytes: int) -> Iterator[Fault]:
    """The outbox, the watch list, and rows about this machine."""
    lost = (
        "SELECT ip.intent, ip.pack FROM intent_packs ip LEFT JOIN intents i ON i.id = ip.intent"
        " LEFT JOIN packs p ON p.id = ip.pack WHERE i.id IS NULL OR p.id IS NULL"
    )
    for intent, pack in look.rows(lost):
        yield Fault("outbox", f"upload {intent}: names pack {pack}, and one of them is missing")
    # A name may be watched and in use: then it is another making of it that is watched for.
    odd = (
        "SELECT filename FROM watched WHERE typeof(filename) != 'text'"
        " OR typeof(after_message) != 'integer' OR typeof(given_up_ns) != 'integer'"
    )
    for (filename,) in look.rows(odd):
        yield Fault("watch-list", f"{readable(filename)}: no entry that can be")
    for table, what in _LEFTOVERS.items():
        gone = (
            f"SELECT t.ino FROM {table} t LEFT JOIN inodes i ON i.ino = t.ino WHERE i.ino IS NULL"
        )
        for (ino,) in look.rows(gone):
            yield Fault("leftovers", f"{what} of inode {ino}, which is missing", table != "dirty")
    pages = block_bytes // 4096
    bad = (
        "SELECT d.ino, d.idx FROM dirty d JOIN inodes i USING (ino) WHERE d.idx < 0"
        f" OR typeof(d.pages) != 'blob' OR length(d.pages) > {max(1, -(-pages // 8))}"
        f" OR d.idx * {block_bytes} >= i.size"
    )
    for ino, index in look.rows(bad):
        yield Fault("dirty-rows", f"{look.path(ino)}: block {index}: what was synced cannot be")
    yield from _check_counter(look, "next_version", look.number("SELECT max(version) FROM dirty"))
