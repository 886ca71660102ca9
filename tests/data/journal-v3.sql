-- The journal as version 3 made it, for the test of its migration.
-- One row a fact about the volume.
CREATE TABLE volume (key TEXT NOT NULL PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

-- One row an inode. nlink 0: without a name, purged when its last handle closes or at the start.
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

-- A file's chunk list. No row is a hole. Beyond valid_length the block is zero, whatever the chunk
-- holds: a truncation cuts here and sends nothing.
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

-- One row a pack (one attachment). message 0: intended only, not confirmed by Discord.
CREATE TABLE packs (
    id INTEGER NOT NULL PRIMARY KEY, object_id BLOB NOT NULL UNIQUE, epoch INTEGER NOT NULL,
    size INTEGER NOT NULL, channel INTEGER NOT NULL, message INTEGER NOT NULL,
    attachment INTEGER NOT NULL, filename TEXT NOT NULL);

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
