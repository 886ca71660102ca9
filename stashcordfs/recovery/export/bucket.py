"""A copy in an S3-compatible bucket: one object a file, and a manifest of all that is no object.

    PREFIX/manifest.jsonl   every entry: folders, links, modes, times, attributes, and files' keys
    PREFIX/tree/PATH        a file whose path can be a key
    PREFIX/odd/HEX          one whose path cannot: the SHA-256 of the path

Every part is sent with its length and MD5 (the SDK's own checks), and the whole object is read back
and hashed before the manifest has it. Until a run has ended, what it has copied is noted on this
machine; at its end the manifest goes up. boto3 is sync: it works in threads.
"""

from __future__ import annotations

import importlib
import logging
import stat
from contextlib import contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import trio

from stashcordfs.errors import ObjectCorrupt, UsageError
from stashcordfs.recovery.export.copying import PIECE_BYTES, Refused
from stashcordfs.recovery.export.manifest import Copied, Entry, Log, Manifest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = logging.getLogger(__name__)

MANIFEST = "manifest.jsonl"
_MOST_KEY_BYTES = 1024  # S3's own limit
_PARTS = 9_000  # S3 allows 10,000
_LEAST_PART_BYTES = 16 << 20
_ENTRY_ERRORS = {"KeyTooLongError", "EntityTooLarge", "InvalidRequest"}


class BucketTarget:
    """The target of `Copy`. `client` is boto3's S3 client, or what behaves like it."""

    def __init__(self, client: Any, bucket: str, prefix: str, log: Path) -> None:
        """`log`: a file on this machine for a run that is cut short; it need not exist."""
        self._client = client
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._log = Log(log)
        self._there: dict[str, int] = {}

    def _key(self, path: bytes) -> str:
        try:
            name = path.decode("utf-8")
        except UnicodeDecodeError:
            name = ""
        key = f"{self._prefix}tree/{name}"
        if name and name.isprintable() and len(key.encode()) <= _MOST_KEY_BYTES:
            return key
        return f"{self._prefix}odd/{sha256(path).hexdigest()}"

    async def load(self, manifest: Manifest) -> None:
        """As `Target` has it: this machine's notes, else the bucket's manifest."""
        await trio.to_thread.run_sync(self._load, manifest)

    def _load(self, manifest: Manifest) -> None:
        try:
            if not self._log.load(manifest):
                self._load_from_bucket(manifest)
        except ObjectCorrupt as error:
            raise UsageError(f"s3://{self._bucket}/{self._prefix}: {error}") from error
        self._log.begin(manifest)
        if manifest.copied:
            self._list()
        self._abort_leftovers()

    def _abort_leftovers(self) -> None:
        """End uploads in parts that a killed run has left: they are paid for, and shown nowhere.

        Only those of keys that an export makes. A server that has no such list, or gives no right
        to it, hinders no copy.
        """
        ours = tuple(f"{self._prefix}{part}" for part in ("tree/", "odd/", MANIFEST))
        try:
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=self._prefix
            )
            left = [up for page in pages for up in page.get("Uploads", ())]
            for up in left:
                if up["Key"].startswith(ours):
                    self._client.abort_multipart_upload(
                        Bucket=self._bucket, Key=up["Key"], UploadId=up["UploadId"]
                    )
        except self._client.exceptions.ClientError as error:
            log.info("unfinished uploads of an earlier run stay: %s", error)

    def _list(self) -> None:
        """What is there: a thousand objects a request."""
        with _explained(self._client):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix
            )
            for page in pages:
                self._there |= {item["Key"]: item["Size"] for item in page.get("Contents", ())}

    def _load_from_bucket(self, manifest: Manifest) -> None:
        with _explained(self._client):
            try:
                body = self._client.get_object(Bucket=self._bucket, Key=self._prefix + MANIFEST)
            except self._client.exceptions.NoSuchKey:
                return
            manifest.read(line + b"\n" for line in body["Body"].iter_lines())

    async def has(self, copied: Copied) -> bool:
        """As `Target` has it: a file's object, with its size, in the listing at the start."""
        return not copied.key or self._there.get(copied.key) == copied.entry.size

    async def clear(self, entry: Entry, known: Copied | None) -> None:
        """As `Target` has it: an object would be forgotten with its line."""
        if known is not None and (known.link is not None or not stat.S_ISREG(entry.mode)):
            await self.remove(known)

    async def begin(self, entry: Entry) -> _ObjectWriter:
        """As `Target` has it."""
        return _ObjectWriter(self._client, self._bucket, self._key(entry.path), entry)

    async def make(self, entry: Entry) -> None:
        """Nothing: the manifest tells of it."""

    async def link(self, entry: Entry, first: Copied) -> Copied:
        """As `Target` has it: the other name's object."""
        return Copied(entry, first.sha256, first.key, first.entry.path)

    async def dress(self, copied: Copied) -> None:
        """Nothing: the manifest tells of it."""

    async def remove(self, copied: Copied) -> None:
        """As `Target` has it."""
        if copied.key and copied.link is None:
            await trio.to_thread.run_sync(self._delete, copied.key)

    def _delete(self, key: str) -> None:
        with _explained(self._client):
            self._client.delete_object(Bucket=self._bucket, Key=key)

    async def note(self, copied: Copied, *, gone: bool = False) -> None:
        """As `Target` has it."""
        self._log.add(copied, gone=gone)

    async def finish(self, manifest: Manifest) -> None:
        """As `Target` has it."""
        await trio.to_thread.run_sync(self._finish, manifest)

    def _finish(self, manifest: Manifest) -> None:
        self._log.begin(manifest)
        self._log.close()
        with _explained(self._client):
            self._client.upload_file(str(self._log.path), self._bucket, self._prefix + MANIFEST)


class _ObjectWriter:
    """An object in one piece when it is small, in parts when it is not."""

    def __init__(self, client: Any, bucket: str, key: str, entry: Entry) -> None:
        self._client = client
        self._to = {"Bucket": bucket, "Key": key}
        self._part_bytes = max(_LEAST_PART_BYTES, -(-entry.size // _PARTS))
        self._metadata = {
            "stashcordfs-size": str(entry.size),
            "stashcordfs-mode": f"{entry.mode:o}",
            "stashcordfs-mtime-ns": str(entry.mtime_ns),
        }
        self._buffer = bytearray()
        self._upload = ""
        self._parts: list[dict[str, Any]] = []

    async def write(self, data: bytes) -> None:
        """As `Writer` has it."""
        self._buffer += data
        if len(self._buffer) >= self._part_bytes:
            await trio.to_thread.run_sync(self._send_part)

    def _send_part(self) -> None:
        with _explained(self._client):
            if not self._upload:
                made = self._client.create_multipart_upload(**self._to, Metadata=self._metadata)
                self._upload = made["UploadId"]
            number = len(self._parts) + 1
            sent = self._client.upload_part(
                **self._to, UploadId=self._upload, PartNumber=number, Body=bytes(self._buffer)
            )
        self._parts.append({"PartNumber": number, "ETag": sent["ETag"]})
        self._buffer.clear()

    async def finish(self, digest: bytes) -> str:
        """As `Writer` has it."""
        await trio.to_thread.run_sync(self._finish, digest)
        return self._to["Key"]

    def _finish(self, digest: bytes) -> None:
        with _explained(self._client):
            if self._upload:
                if self._buffer:
                    self._send_part()
                self._client.complete_multipart_upload(
                    **self._to, UploadId=self._upload, MultipartUpload={"Parts": self._parts}
                )
                self._upload = ""
            else:
                body = bytes(self._buffer)
                self._client.put_object(**self._to, Body=body, Metadata=self._metadata)
            found = sha256()
            for piece in self._client.get_object(**self._to)["Body"].iter_chunks(PIECE_BYTES):
                found.update(piece)
        if found.digest() != digest:
            raise Refused("what was sent reads back otherwise")

    async def abandon(self) -> None:
        """As `Writer` has it: unfinished parts would be paid for."""
        if self._upload:
            await trio.to_thread.run_sync(self._abort)

    def _abort(self) -> None:
        with _explained(self._client):
            self._client.abort_multipart_upload(**self._to, UploadId=self._upload)
        self._upload = ""


@contextmanager
def _explained(client: Any) -> Iterator[None]:
    """What the SDK raises, as ours: an object that is refused alone, or an end of it all."""
    errors = importlib.import_module("botocore.exceptions")
    try:
        yield
    except client.exceptions.ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code in _ENTRY_ERRORS:
            raise Refused(str(error)) from error
        raise UsageError(f"the bucket: {error}") from error
    except (errors.BotoCoreError, errors.HTTPClientError) as error:
        raise UsageError(f"the bucket: {error}") from error


def open_bucket(url: str, *, endpoint_url: str | None, log: Path) -> BucketTarget:
    """The target of an URL s3://BUCKET/PREFIX. Credentials are the SDK's to find. UsageError."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if not bucket:
        raise UsageError(f"{url}: give it as s3://BUCKET/PREFIX")
    try:
        boto3 = importlib.import_module("boto3")
    except ImportError:
        raise UsageError("an S3 bucket needs boto3: pip install 'stashcordfs[s3]'") from None
    config = importlib.import_module("botocore.config").Config
    errors = importlib.import_module("botocore.exceptions")
    try:
        client = boto3.client(
            "s3", endpoint_url=endpoint_url, config=config(retries={"mode": "standard"})
        )
        client.head_bucket(Bucket=bucket)
    except (errors.BotoCoreError, errors.ClientError, ValueError) as error:
        raise UsageError(f"{url}: {error}") from error
    return BucketTarget(client, bucket, prefix, log)
