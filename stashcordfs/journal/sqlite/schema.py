"""The schema, explained beside its tables, and its versioned migrations.

Two kinds of tables. *Replicated* ones are the volume: what segments and checkpoints carry to
Discord (session extension: primary keys never null, no triggers, no foreign-key actions). *Local*
ones are this machine's alone: what it has cached, what only it has (`dirty`), where its uploads
stand, and what it must still tell Discord. A table belongs to one kind whole; `inodes.atime_ns`
alone is replicated only along with another change of its row. Integers named `ino`, `cookie` or
`id` come from counters and are never used twice; times are in ns since the epoch.

There is no ANALYZE: its figures of a young journal made the planner scan whole tables once the
journal had grown. Statements leave the planner no choice instead, and a test reads their plans.
"""

from __future__ import annotations

import re

from stashcordfs.errors import JournalError

APPLICATION_ID = 0x53544644  # "STFD"
VERSION = 6

REPLICATED = """
-- One row a fact about the volume.
CREATE TABLE volume (key TEXT NOT NULL PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

-- One row an inode. nlink 0: without a name; if it is not in `trash`, purged when its last handle
-- closes or at the start.
-- `stored` is the sum of the chunk list's valid lengths, kept with it: `ls` asks for it each time.
CREATE TABLE inodes (
    ino INTEGER NOT NULL PRIMARY KEY,
    mode INTEGER NOT NULL, nlink INTEGER NOT NULL, uid INTEGER NOT NULL, gid INTEGER NOT NULL,
    rdev INTEGER NOT NULL, size INTEGER NOT NULL,
    atime_ns INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL,
    stored INTEGER NOT NULL DEFAULT 0);
CREATE INDEX inodes_nameless ON inodes (ino) WHERE nlink = 0;

-- One row a name. `cookie` orders a folder's entries for readdir: it grows, so that a listing goes
-- on rightly while names come and go. Cookies below 16 are kept for "." and "..". A look-up is one
-- search of the primary key; as that is part of every index, the other two cover their questions.
CREATE TABLE dirents (
    parent INTEGER NOT NULL, name BLOB NOT NULL, cookie INTEGER NOT NULL, ino INTEGER NOT NULL,
    PRIMARY KEY (parent, name)) WITHOUT ROWID;
CREATE INDEX dirents_order ON dirents (parent, cookie, ino);
CREATE INDEX dirents_ino ON dirents (ino);

-- A symbolic link's target, at most 4095 bytes.
CREATE TABLE symlinks (ino INTEGER NOT NULL PRIMARY KEY, target BLOB NOT NULL);

-- Extended attributes.
CREATE TABLE xattrs (
    ino INTEGER NOT NULL, name BLOB NOT NULL, value BLOB NOT NULL,
    PRIMARY KEY (ino, name)) WITHOUT ROWID;

-- A file's chunk list. No row is a hole. A chunk that is not there (`fsck` writes 0) is lost, and
-- reading the block an error. Beyond valid_length the block is zero, whatever the chunk holds: a
-- truncation cuts here and sends nothing.
CREATE TABLE chunk_list (
    ino INTEGER NOT NULL, idx INTEGER NOT NULL, chunk INTEGER NOT NULL,
    valid_length INTEGER NOT NULL,
    PRIMARY KEY (ino, idx)) WITHOUT ROWID;

-- One row a chunk in a pack: its keyed hash and its place there. `number` is also the nonce. Two
-- uploads may carry the same chunk; each keeps its own row, so that neither's outcome hangs on the
-- other's.
CREATE TABLE chunks (
    id INTEGER NOT NULL PRIMARY KEY, chunk_id BLOB NOT NULL, pack INTEGER NOT NULL,
    number INTEGER NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL,
    plain_length INTEGER NOT NULL, codec INTEGER NOT NULL);
CREATE UNIQUE INDEX chunks_id ON chunks (chunk_id, pack);
CREATE INDEX chunks_pack ON chunks (pack);

-- One row a pack (one attachment). message 0: intended only, not confirmed by Discord; below 0: it
-- was there, as message -message, and `verify` has found it missing. Nothing refers to it anew.
CREATE TABLE packs (
    id INTEGER NOT NULL PRIMARY KEY, object_id BLOB NOT NULL UNIQUE, epoch INTEGER NOT NULL,
    size INTEGER NOT NULL, channel INTEGER NOT NULL, message INTEGER NOT NULL,
    attachment INTEGER NOT NULL, filename TEXT NOT NULL);

-- Messages in which nothing is needed any more, and of how many bytes: deleted some time after a
-- segment has told of it. Their packs have a message below 0 until their rows are gone, too.
CREATE TABLE condemned (
    channel INTEGER NOT NULL, message INTEGER NOT NULL, since_ns INTEGER NOT NULL,
    size INTEGER NOT NULL, PRIMARY KEY (channel, message)) WITHOUT ROWID;

-- What was deleted or overwritten and may come back: a file, or a folder that held such files. Its
-- inode stays with nlink 0, and so do its chunk list and attributes. `parent` and `name`: where it
-- was; the parent may be in the trash as well. `lost`: so many of its blocks Discord did not have.
-- No index, which each unlink would have to keep: whose parents they are is in memory.
CREATE TABLE trash (
    ino INTEGER NOT NULL PRIMARY KEY, parent INTEGER NOT NULL, name BLOB NOT NULL,
    deleted_ns INTEGER NOT NULL, lost INTEGER NOT NULL);
"""

LOCAL = """
-- Facts of this machine: counters, boot ids.
CREATE TABLE local (key TEXT NOT NULL PRIMARY KEY, value) WITHOUT ROWID;

-- The outbox: an upload is here, durably, before its first byte leaves.
CREATE TABLE intents (
    id INTEGER NOT NULL PRIMARY KEY, nonce TEXT NOT NULL, channel INTEGER NOT NULL,
    after_message INTEGER NOT NULL, created_ns INTEGER NOT NULL);
CREATE TABLE intent_packs (
    intent INTEGER NOT NULL, pack INTEGER NOT NULL, PRIMARY KEY (intent, pack)) WITHOUT ROWID;

-- What fsync made durable of blocks that are not on Discord: which pages of the local file count.
CREATE TABLE dirty (
    ino INTEGER NOT NULL, idx INTEGER NOT NULL, version INTEGER NOT NULL, pages BLOB NOT NULL,
    PRIMARY KEY (ino, idx)) WITHOUT ROWID;

-- Which generation of the local file is an inode's own. No row: 0.
CREATE TABLE generations (ino INTEGER NOT NULL PRIMARY KEY, generation INTEGER NOT NULL);

-- Blocks of which every byte is in the local file. While the block is clean, `sums` are the
-- checksums of its first `length` bytes (cache.sums); beyond them it is zero.
CREATE TABLE cached (
    ino INTEGER NOT NULL, idx INTEGER NOT NULL, length INTEGER NOT NULL, sums BLOB NOT NULL,
    PRIMARY KEY (ino, idx)) WITHOUT ROWID;

-- Files that have grown since their bytes were last synced, and their size then: after a power cut
-- the size falls back to it, else bytes that never reached the disk would read as zeros.
CREATE TABLE synced_sizes (ino INTEGER NOT NULL PRIMARY KEY, size INTEGER NOT NULL);

-- Attachments whose upload was given up while its outcome was unknown: deleted when they appear.
CREATE TABLE watched (
    filename TEXT NOT NULL PRIMARY KEY, after_message INTEGER NOT NULL,
    given_up_ns INTEGER NOT NULL) WITHOUT ROWID;

-- What no segment holds yet: one row a group of operations, as SQLite's session extension records
-- it. Ids go on over segments, checkpoints and writers, without gaps.
CREATE TABLE changes (id INTEGER PRIMARY KEY, made_ns, changeset);

-- This volume's sealed objects in the journal channel, of this writer and of those that it took
-- over from; anything else of the volume there is another writer's. `number` and `part` as the
-- object says, `last_change` the last row of `changes` that it holds, `digest` its SHA-256. message
-- 0: not confirmed; -1: dropped, and remembered for a while. `sealed`: a segment's bytes, until it
-- and the next one are on Discord.
CREATE TABLE objects (
    object_id PRIMARY KEY, kind, number, part, last_change, made_ns, digest, size, sealed,
    channel, message, attachment) WITHOUT ROWID;
CREATE INDEX objects_order ON objects (kind, number, part);

-- Chunks that only history (and the trash) may need, and since when that is known: nothing else
-- refers to them. What refers to one anew takes its row away in the same transaction.
CREATE TABLE unused (chunk INTEGER PRIMARY KEY, since_ns);

-- Attachments of messages that a purge deletes, and the links under which the CDN may serve them
-- yet: it is asked again until it does not. `gone`: Discord shows the message no more.
CREATE TABLE erasing (
    channel INTEGER NOT NULL, message INTEGER NOT NULL, attachment INTEGER NOT NULL, url, since_ns,
    gone, PRIMARY KEY (channel, message, attachment)) WITHOUT ROWID;
"""

REPLICATED_TABLES = tuple(re.findall(r"CREATE TABLE (\w+)", REPLICATED))

# Without the schema nothing can be read of a damaged file (`salvage`). It needs more than the first
# page, and would be spread over pages that come after all tables' first ones. What is made here,
# and dropped, lets it be among the very first pages: those that a file loses last.
_PADS = ("pad_1", "pad_2")
_MAKE_ROOM = "".join(f"CREATE TABLE {pad} (x /*{'-' * 2500}*/);" for pad in _PADS)
_LEAVE_ROOM = "".join(f"DROP TABLE {pad};" for pad in _PADS)
SCHEMA = _MAKE_ROOM + REPLICATED + LOCAL + _LEAVE_ROOM
WANT_CHECKPOINT = "INSERT OR REPLACE INTO local VALUES ('checkpoint_wanted', 1)"
# After rows were lost. What is on Discord and not known here is no garbage: no orphan is deleted.
# The channel is looked at from its start, since own objects that are not known any more must stop
# this writer, who would make their numbers once more.
DOUBT = """
INSERT OR REPLACE INTO local VALUES ('orphans_spared', '1');
UPDATE local SET value = '0' WHERE key = 'journal_seen';
"""

# From version n to n + 1. A new journal is made by SCHEMA at once; a test holds the two together.
MIGRATIONS: dict[int, str] = {
    1: """
    CREATE TABLE dirents_2 (
        parent INTEGER NOT NULL, name BLOB NOT NULL, cookie INTEGER NOT NULL, ino INTEGER NOT NULL,
        PRIMARY KEY (parent, name)) WITHOUT ROWID;
    INSERT INTO dirents_2 SELECT parent, name, cookie, ino FROM dirents;
    DROP TABLE dirents;
    ALTER TABLE dirents_2 RENAME TO dirents;
    CREATE INDEX dirents_order ON dirents (parent, cookie, ino);
    CREATE INDEX dirents_ino ON dirents (ino);
    ALTER TABLE inodes ADD COLUMN stored INTEGER NOT NULL DEFAULT 0;
    UPDATE inodes SET stored = l.bytes
        FROM (SELECT ino, sum(valid_length) AS bytes FROM chunk_list GROUP BY ino) AS l
        WHERE l.ino = inodes.ino;
    -- What ANALYZE had gathered.
    DROP TABLE IF EXISTS sqlite_stat1;
    DROP TABLE IF EXISTS sqlite_stat4;
    """,
    # Clean blocks without checksums are not believed: they are fetched anew.
    2: """
    DROP TABLE cached;
    CREATE TABLE cached (
        ino INTEGER NOT NULL, idx INTEGER NOT NULL, length INTEGER NOT NULL, sums BLOB NOT NULL,
        PRIMARY KEY (ino, idx)) WITHOUT ROWID;
    CREATE TABLE synced_sizes (ino INTEGER NOT NULL PRIMARY KEY, size INTEGER NOT NULL);
    CREATE TABLE watched (
        filename TEXT NOT NULL PRIMARY KEY, after_message INTEGER NOT NULL,
        given_up_ns INTEGER NOT NULL) WITHOUT ROWID;
    """,
    # The checksums' unit is smaller. A length of 0 is a whole dirty block, which stays.
    3: """
    DELETE FROM cached WHERE length > 0;
    """,
    # No segment can hold what was before: a checkpoint must come first.
    4: """
    CREATE TABLE changes (id INTEGER PRIMARY KEY, made_ns, changeset);

    CREATE TABLE objects (
        object_id PRIMARY KEY, kind, number, part, last_change, made_ns, digest, size, sealed,
        channel, message, attachment) WITHOUT ROWID;
    CREATE INDEX objects_order ON objects (kind, number, part);
    INSERT OR REPLACE INTO local VALUES ('checkpoint_wanted', 1);
    """,
    5: """
    CREATE TABLE condemned (
        channel INTEGER NOT NULL, message INTEGER NOT NULL, since_ns INTEGER NOT NULL,
        size INTEGER NOT NULL, PRIMARY KEY (channel, message)) WITHOUT ROWID;
    CREATE TABLE unused (chunk INTEGER PRIMARY KEY, since_ns);
    CREATE TABLE erasing (
        channel INTEGER NOT NULL, message INTEGER NOT NULL, attachment INTEGER NOT NULL, url,
        since_ns, gone, PRIMARY KEY (channel, message, attachment)) WITHOUT ROWID;
    CREATE TABLE trash (
        ino INTEGER NOT NULL PRIMARY KEY, parent INTEGER NOT NULL, name BLOB NOT NULL,
        deleted_ns INTEGER NOT NULL, lost INTEGER NOT NULL);
        INSERT OR REPLACE INTO local VALUES ('checkpoint_wanted', 1);
    """,
}


def check_version(found: int) -> None:
    """Refuse a journal that a newer program has written."""
    if found > VERSION:
        msg = f"the journal has format {found}, this program knows {VERSION}: use a newer program"
        raise JournalError(msg)
