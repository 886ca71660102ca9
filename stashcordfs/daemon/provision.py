"""Making volumes, opening their keys, and changing their key slots.

The volume's record (format, key slots) is posted to the journal channel and kept in STATE/NAME as
it was posted. Everything else that mkfs decides is in `volume.json` beside it.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
import uuid
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import trio

from stashcordfs.crypto import slots
from stashcordfs.crypto.keys import KEY_BYTES, VolumeKeys
from stashcordfs.daemon.assembly import Telling
from stashcordfs.daemon.token import Token
from stashcordfs.discord.client import ClientStats, DiscordClient
from stashcordfs.discord.kept import KeptLimits
from stashcordfs.errors import AccessDenied, NotFound, StashcordError, TokenRejected, UsageError
from stashcordfs.journal import Journal
from stashcordfs.store import record as records
from stashcordfs.store.discord_store import DiscordStore
from stashcordfs.store.segment import genesis
from stashcordfs.vfs.checkpointing import CheckpointSettings
from stashcordfs.vfs.garbage_plan import CollectSettings
from stashcordfs.vfs.journal_channel import SEEN
from stashcordfs.volumes import VolumeDir, VolumeRecord

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from stashcordfs.config import Settings
    from stashcordfs.types import Location

T = TypeVar("T")
_RECORD = "record"


def _silent(text: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True)
class MkfsResult:
    """What mkfs tells the user; the recovery key is shown once and kept nowhere."""

    volume_uuid: str
    recovery_key: str


def store_on(client: DiscordClient, volume: VolumeRecord) -> DiscordStore:
    """The volume's store on Discord. No request is made yet: a mount starts without a network."""
    return DiscordStore(
        client,
        channels=list(volume.channels),
        journal_channel=volume.journal_channel,
        block_bytes=volume.block_size,
    )


def journal_store_on(client: DiscordClient, volume: VolumeRecord) -> DiscordStore:
    """The same, bound to the journal channel alone."""
    channel = volume.journal_channel
    return DiscordStore(client, channels=[channel], journal_channel=channel)


def telling(
    client: DiscordClient, volume: VolumeDir, stats: ClientStats, settings: Settings
) -> Telling:
    """What a mount needs to tell Discord of its journal, and to collect garbage."""
    record = read_record(volume)
    history_s = settings.history_days * 86_400.0
    return Telling(
        store=journal_store_on(client, volume.read_record()),
        genesis=genesis(record),
        record=records.PostedRecord(record.filename, (volume.path / _RECORD).read_bytes()),
        host=socket.gethostname(),
        requests=lambda: stats.requests,
        checkpoints=CheckpointSettings(keep_s=history_s),
        garbage=CollectSettings(history_s=history_s, share=settings.gc_share),
    )


@asynccontextmanager
async def open_store(
    token: Callable[[], str],
    volume: VolumeRecord,
    stats: ClientStats,
    kept: KeptLimits | None = None,
) -> AsyncIterator[DiscordStore]:
    """The same with a client of its own, for a command."""
    async with DiscordClient(api_url=volume.api_url, token=token, stats=stats, kept=kept) as client:
        yield store_on(client, volume)


def open_keys(settings: Settings, volume: VolumeDir) -> VolumeKeys:
    """Unlock the volume with the passphrase of the settings. Takes a second: Argon2id."""
    if settings.passphrase is None:
        raise UsageError("passphrase: not set; set STASHCORDFS_PASSPHRASE, or file:PATH in TOML")
    return unlock(read_record(volume), passphrase=settings.passphrase.reveal())[1]


def read_record(volume: VolumeDir) -> records.VolumeRecord:
    """The record as it was posted last, from STATE/NAME."""
    path = volume.path / _RECORD
    try:
        return records.decode(path.read_bytes())
    except OSError as error:
        text = f"{path}: {error.strerror}; is this the right state directory?"
        raise StashcordError(text) from error


def unlock(
    record: records.VolumeRecord, *, passphrase: str | None = None, recovery_key: str | None = None
) -> tuple[dict[int, bytes], VolumeKeys]:
    """Open the keys by either secret, and check that the record is what was sealed with them."""
    masters = slots.unlock(record.slots, passphrase=passphrase, recovery_key=recovery_key)
    keys = VolumeKeys(record.volume, masters)
    records.verify(record, keys)
    return masters, keys


def mkfs(
    settings: Settings,
    name: str,
    *,
    channels: Sequence[int],
    journal_channel: int | None = None,
    block_size: int,
    passphrase: str,
    progress: Callable[[str], None] = _silent,
    cost: slots.Argon2Cost | None = None,
) -> MkfsResult:
    """Make a volume: keys, record on Discord, empty journal here. Refuses what is in use."""
    volume = VolumeDir(settings.state_dir, name)
    if volume.exists():
        raise UsageError(f"volume {name} exists already: choose another name, or destroy it first")
    if not channels:
        raise UsageError("--channel: give the id of at least one channel")
    local = VolumeRecord(
        uuid=str(uuid.uuid4()),
        channels=tuple(channels),
        journal_channel=journal_channel or channels[0],
        api_url=settings.api_url,
        block_size=block_size,
    )
    token = Token(settings)
    trio.run(_check_channels, token, local, progress)
    progress("making keys")
    identity = uuid.UUID(local.uuid).bytes
    master = secrets.token_bytes(KEY_BYTES)
    made, recovery_key = slots.create_slots(
        identity, master, passphrase=passphrase, cost=cost or slots.DEFAULT_COST
    )
    record = records.VolumeRecord(identity, block_size, made, int(time.time()))
    keys = VolumeKeys(identity, {made.epoch: master})
    volume.create()
    with volume.lock():
        posted = _post(token, local, volume, record, keys, progress)
        Journal.create(
            volume.journal_path,
            clock_ns=time.time_ns,
            uid=os.getuid(),
            gid=os.getgid(),
            facts={SEEN: str(posted.message)},
        ).close()
        volume.write_record(local)
    return MkfsResult(local.uuid, recovery_key)


async def _check_channels(
    token: Token, local: VolumeRecord, progress: Callable[[str], None]
) -> None:
    progress("looking at the channels")
    async with open_store(token, local, ClientStats()) as store:
        await explained(store.learn_limits)
        await explained(store.newest_id)
        if found := await explained(store.find_records):
            uuid_found = records.decode(found[0]).uuid
            raise UsageError(
                f"channel {local.journal_channel} already holds volume {uuid_found}: "
                "use an empty channel"
            )


async def explained(call: Callable[[], Awaitable[T]]) -> T:
    """Run a request; what usually goes wrong the first time is told in a user's words."""
    try:
        return await call()
    except TokenRejected as error:
        raise StashcordError(
            "Discord rejects the token: copy the bot's token anew from the developer portal"
        ) from error
    except AccessDenied as error:
        raise StashcordError(
            f"the bot lacks a permission in the channel ({error}): give it View Channel, Send "
            "Messages, Attach Files and Read Message History"
        ) from error
    except NotFound as error:
        raise StashcordError(
            "no such channel: copy its id (developer mode, Copy Channel ID) and invite the bot "
            "to its server"
        ) from error


def _post(
    token: Token,
    local: VolumeRecord,
    volume: VolumeDir,
    record: records.VolumeRecord,
    keys: VolumeKeys,
    progress: Callable[[str], None],
) -> Location:
    """Post the record, then keep the same bytes in STATE/NAME, whole or not at all."""
    data = records.encode(record, keys)

    async def post() -> Location:
        kept = KeptLimits(volume.limits_path)
        async with open_store(token, local, ClientStats(), kept) as store:
            return await explained(lambda: store.post_record(data, record.filename))

    progress("posting the volume's record")
    posted = trio.run(post)
    keep_record(volume, data)
    return posted


def keep_record(volume: VolumeDir, data: bytes) -> None:
    """Keep the record in STATE/NAME as it was posted, whole or not at all."""
    temporary = volume.path / f"{_RECORD}.new"
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(volume.path / _RECORD)


def change_keys(
    settings: Settings,
    name: str,
    action: str,
    *,
    passphrase: str | None = None,
    recovery_key: str | None = None,
    new_passphrase: str | None = None,
    slot_id: str | None = None,
    cost: slots.Argon2Cost = slots.DEFAULT_COST,
) -> list[dict[str, str]] | str:
    """`show`, `add`, `change` or `remove` key slots, opened by either secret.

    `add` and `change` without a new passphrase make a recovery key. Returns the slots, or the new
    recovery key where one was made. The changed record is posted before this returns.
    """
    volume = VolumeDir(settings.state_dir, name)
    local = volume.read_record()
    record = read_record(volume)
    fresh_key = ""
    if action != "show":
        with volume.lock():
            masters, keys = unlock(record, passphrase=passphrase, recovery_key=recovery_key)
            changed = record.slots
            if action == "remove":
                changed = slots.remove_slot(changed, slot_id or "")
            elif new_passphrase is not None:
                changed = slots.add_passphrase(changed, masters, new_passphrase, cost=cost)
            else:
                changed, fresh_key = slots.add_recovery(changed, masters)
            if action == "change":
                kind = slots.RECOVERY if fresh_key else slots.PASSPHRASE
                for old in [slot for slot in record.slots.slots if slot.kind == kind]:
                    changed = slots.remove_slot(changed, old.id)
            record = replace(record, serial=record.serial + 1, slots=changed)
            _post(Token(settings), local, volume, record, keys, _silent)
    return fresh_key or [{"id": slot.id, "kind": slot.kind} for slot in record.slots.slots]
