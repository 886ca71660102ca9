"""Copies of a volume in a folder and in a bucket: whole, checked, and only what changed."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest
import trio.testing

from stashcordfs.errors import UsageError
from stashcordfs.recovery.export.bucket import open_bucket
from stashcordfs.recovery.export.copying import Copy, Outcome
from stashcordfs.recovery.export.folder import MANIFEST, FolderTarget
from stashcordfs.recovery.export.manifest import Manifest
from stashcordfs.recovery.export.sources import MountSource, VolumeSource
from stashcordfs.types import ROOT_INO

sys.path.insert(0, str(Path(__file__).parents[1] / "vfs"))
from harness import BLOCK, volume

ODD = b"caf\xe9 \x01"
NO_MODES = Outcome


@pytest.fixture
def clock() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0.02)


async def fill(v):
    folder = await v.fs.mkdir(ROOT_INO, b"folder", 0o750, 0, 0)
    big = await v.make(b"big", os.urandom(3 * BLOCK + 5), parent=folder.ino)
    await v.fs.link(big, ROOT_INO, b"other name")
    await v.fs.symlink(ROOT_INO, b"link", b"folder/big", 0, 0)
    await v.fs.setxattr(big, b"user.note", b"\0kept")
    await v.make(ODD, b"odd")
    await v.make(b"empty")
    hole = await v.make(b"hole")
    fh = await v.fs.open(hole, 2)
    await v.fs.write(fh, 4 << 20, b"end")
    await v.fs.release(fh)
    return folder.ino, big


async def copy(source, target, *, outcome=None, delete=False, uuid="u"):
    run = Copy(
        source, target, Manifest(uuid), total=0, progress=lambda *_: None,
        outcome=outcome, delete=delete,
    )  # fmt: skip
    return await run.run()


async def into_folder(v, to, **more):
    outcome = Outcome()
    return await copy(VolumeSource(v.fs), FolderTarget(to, outcome), outcome=outcome, **more)


def shown(folder):
    """Everything but the manifest: what it is, and its content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = os.fsencode(path.relative_to(folder))
        s = path.lstat()
        content = (
            path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        )
        if path.name != MANIFEST:
            found[name] = (s.st_mode, s.st_mtime_ns, s.st_nlink, content)
    return found


async def test_a_folder_gets_names_contents_modes_times_links_and_attributes(
    clock, tmp_path
) -> None:
    async with volume(tmp_path / "v") as v:
        _, big = await fill(v)
        outcome = await into_folder(v, tmp_path / "to")
        wanted = await v.read(big)
        attributes = await v.fs.getattr(big)

    assert outcome.clean
    assert outcome.entries == {"files": 5, "folders": 1, "others": 1}
    to = tmp_path / "to"
    assert (to / "folder/big").read_bytes() == (to / "other name").read_bytes() == wanted
    assert (to / "folder/big").samefile(to / "other name")
    assert (to / "folder/big").stat().st_mtime_ns == attributes.mtime_ns
    assert stat.S_IMODE((to / "folder").stat().st_mode) == 0o750
    assert (to / "link").readlink() == Path("folder/big")
    assert shown(to)[ODD][3] == b"odd"
    assert (to / "hole").stat().st_size == (4 << 20) + 3
    assert (to / "hole").stat().st_blocks * 512 < 1 << 20
    if "user.note" in os.listxattr(to / "folder/big"):  # where the file system has them
        assert os.getxattr(to / "folder/big", "user.note") == b"\0kept"
    else:
        assert outcome.not_kept["extended attributes"]


async def test_a_second_run_copies_only_what_changed(clock, tmp_path) -> None:
    async with volume(tmp_path / "v") as v:
        folder, big = await fill(v)
        await into_folder(v, tmp_path / "to")
        again = await into_folder(v, tmp_path / "to")
        before = shown(tmp_path / "to")
        fh = await v.fs.open(big, 2)
        await v.fs.write(fh, 0, b"changed")
        await v.fs.flush(fh)
        await v.fs.release(fh)
        await v.fs.setattr(big, mtime_ns=5)
        await v.fs.unlink(ROOT_INO, b"empty")
        await v.make(b"new", b"new", parent=folder)
        changed = await into_folder(v, tmp_path / "to")
        kept = shown(tmp_path / "to")
        mirrored = await into_folder(v, tmp_path / "to", delete=True)
        now = shown(tmp_path / "to")

    assert (again.copied_files, again.unchanged) == (0, 6)
    assert changed.copied_files == 2
    assert before[b"empty"] == kept[b"empty"]
    assert (mirrored.removed, mirrored.copied_files) == (1, 0)
    assert b"empty" not in now
    assert now[b"folder/new"][3] == b"new"
    assert now[b"folder/big"][3] == now[b"other name"][3]
    assert now[b"folder/big"][3].startswith(b"changed")


async def test_a_run_cut_short_is_gone_on_with(clock, tmp_path, monkeypatch) -> None:
    async with volume(tmp_path / "v") as v:
        for n in range(40):
            await v.make(b"f%d" % n, b"content %d" % n)
        for cut in (1, 2, 3, 5):
            calls = 0
            real = os.rename

            def rename(a, b, cut=cut, real=real):
                nonlocal calls
                calls += 1
                real(a, b)
                if calls > cut:
                    raise RuntimeError  # killed: the file is there, its line is not

            monkeypatch.setattr("stashcordfs.recovery.export.folder.os.rename", rename)
            with pytest.raises((RuntimeError, BaseExceptionGroup)):
                await into_folder(v, tmp_path / "to")
            monkeypatch.setattr("stashcordfs.recovery.export.folder.os.rename", real)
        last = await into_folder(v, tmp_path / "to")

    assert last.clean
    assert 0 < last.unchanged < 40
    found = shown(tmp_path / "to")
    assert {n: f[3] for n, f in found.items()} == {b"f%d" % n: b"content %d" % n for n in range(40)}


async def test_what_cannot_be_read_is_told_and_the_rest_copied(clock, tmp_path) -> None:
    async with volume(tmp_path / "v") as v:
        await v.make(b"lost", os.urandom(BLOCK))
        await v.fs.sync_remote()
    for file in (tmp_path / "v" / "blocks").rglob("*"):
        if file.is_file():
            file.unlink()
    async with volume(tmp_path / "v") as v:
        v.store.missing = True
        await v.make(b"whole", b"whole")
        outcome = await into_folder(v, tmp_path / "to")

    assert list(outcome.failed) == ["lost"]
    assert list(shown(tmp_path / "to")) == [b"whole"]


async def test_foreign_things_are_neither_replaced_nor_followed(clock, tmp_path) -> None:
    to = tmp_path / "to"
    async with volume(tmp_path / "v") as v:
        await v.make(b"a", b"a")
        await into_folder(v, to)
        (to / "mine").write_text("mine")
        (to / "folder").symlink_to(tmp_path)
        folder = await v.fs.mkdir(ROOT_INO, b"folder", 0o755, 0, 0)
        await v.make(b"inside", b"x", parent=folder.ino)
        await v.make(b"mine", b"of the volume")
        outcome = await into_folder(v, to, delete=True)

    assert "folder" in outcome.failed
    assert "mine" in outcome.failed
    assert (to / "mine").read_text() == "mine"
    assert not (tmp_path / "inside").exists()


async def test_another_folder_and_another_volumes_copy_are_refused(clock, tmp_path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    async with volume(tmp_path / "v") as v:
        with pytest.raises(UsageError, match="not empty"):
            await into_folder(v, tmp_path / "full")
        await into_folder(v, tmp_path / "to")
        with pytest.raises(UsageError, match="another volume"):
            await into_folder(v, tmp_path / "to", uuid="other")


async def test_what_reads_back_otherwise_is_no_copy(clock, tmp_path, monkeypatch) -> None:
    def write(self, data, offset):
        os.pwrite(self._file, bytes(data).replace(b"a", b"b"), offset)

    monkeypatch.setattr("stashcordfs.recovery.export.folder._FileWriter._write", write)
    async with volume(tmp_path / "v") as v:
        await v.make(b"a", b"aaa")
        outcome = await into_folder(v, tmp_path / "to")

    assert "reads back otherwise" in outcome.failed["a"]
    assert shown(tmp_path / "to") == {}


async def test_a_mount_is_read_as_any_folder(tmp_path) -> None:
    source = tmp_path / "source"
    (source / "d").mkdir(parents=True)
    (source / "d" / "f").write_bytes(b"f" * 3_000_000)
    (source / "d" / "l").symlink_to("f")
    outcome = Outcome()
    await copy(
        MountSource(os.fsencode(source)), FolderTarget(tmp_path / "to", outcome), outcome=outcome
    )
    assert outcome.clean
    assert (tmp_path / "to" / "d" / "f").read_bytes() == b"f" * 3_000_000
    assert (tmp_path / "to" / "d" / "l").is_symlink()


# A bucket


@pytest.fixture(scope="module")
def endpoint():
    """A server that speaks S3's protocol, in this process."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint, monkeypatch):
    import boto3

    for name, value in (
        ("ACCESS_KEY_ID", "x"),
        ("SECRET_ACCESS_KEY", "x"),
        ("REGION", "us-east-1"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="copies")
    yield client
    for up in client.list_multipart_uploads(Bucket="copies").get("Uploads", ()):
        client.abort_multipart_upload(Bucket="copies", Key=up["Key"], UploadId=up["UploadId"])
    for item in client.list_objects_v2(Bucket="copies").get("Contents", ()):
        client.delete_object(Bucket="copies", Key=item["Key"])
    client.delete_bucket(Bucket="copies")


async def into_bucket(v, endpoint, log, **more):
    target = open_bucket("s3://copies/my/volume", endpoint_url=endpoint, log=log)
    return await copy(VolumeSource(v.fs), target, **more)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_a_bucket_gets_every_file_and_a_manifest_of_the_rest(
    clock, tmp_path, endpoint, bucket, monkeypatch
) -> None:
    monkeypatch.setattr("stashcordfs.recovery.export.bucket._LEAST_PART_BYTES", 5 << 20)
    async with volume(tmp_path / "v") as v:
        folder, big = await fill(v)
        large = os.urandom(1 << 20) * 11
        await v.make(b"large", large)
        outcome = await into_bucket(v, endpoint, tmp_path / "log")
        wanted = await v.read(big)
        (tmp_path / "log").unlink()  # another machine goes on, from the bucket's manifest
        again = await into_bucket(v, endpoint, tmp_path / "log")
        await v.fs.unlink(ROOT_INO, b"large")
        await v.make(b"new", b"new", parent=folder)
        changed = await into_bucket(v, endpoint, tmp_path / "log", delete=True)

    def body(key):
        return bucket.get_object(Bucket="copies", Key=key)["Body"].read()

    assert outcome.clean
    assert outcome.copied_files == 5
    assert (again.copied_files, again.unchanged) == (0, 7)
    assert (changed.copied_files, changed.removed) == (1, 1)
    lines = [json.loads(line) for line in body("my/volume/manifest.jsonl").splitlines()]
    by_path = {str(line.get("path")): line for line in lines[1:]}
    assert body(by_path["folder/big"]["key"]) == wanted
    assert by_path["folder/big"]["key"] == "my/volume/tree/other name"
    assert by_path["folder/big"]["link"] == "other name"
    assert by_path["link"]["target"] == "folder/big"
    odd = next(line for line in lines[1:] if isinstance(line["path"], dict))
    assert odd["key"].startswith("my/volume/odd/")
    assert body(odd["key"]) == b"odd"
    assert "large" not in by_path
    keys = {item["Key"] for item in bucket.list_objects_v2(Bucket="copies")["Contents"]}
    assert keys == {line["key"] for line in lines[1:] if "key" in line} | {
        "my/volume/manifest.jsonl"
    }


def unfinished(bucket) -> set[str]:
    return {up["Key"] for up in bucket.list_multipart_uploads(Bucket="copies").get("Uploads", ())}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_parts_that_a_killed_run_left_are_aborted_and_nobody_elses(
    clock, tmp_path, endpoint, bucket
) -> None:
    for key in ("my/volume/tree/large", "my/volume/odd/00", "my/volume/manifest.jsonl"):
        bucket.create_multipart_upload(Bucket="copies", Key=key)
    theirs = {"my/volume-2/tree/a", "my/volume/other", "tree/a"}
    for key in theirs:
        bucket.create_multipart_upload(Bucket="copies", Key=key)
    async with volume(tmp_path / "v") as v:
        await v.make(b"a", b"a")
        assert (await into_bucket(v, endpoint, tmp_path / "log")).clean
        assert unfinished(bucket) == theirs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_a_bucket_that_lists_no_unfinished_uploads_is_copied_to_all_the_same(
    clock, tmp_path, endpoint, bucket
) -> None:
    target = open_bucket("s3://copies/my/volume", endpoint_url=endpoint, log=tmp_path / "log")
    made = target._client.get_paginator

    def refuse(name):
        if name == "list_multipart_uploads":
            raise target._client.exceptions.ClientError({"Error": {"Code": "AccessDenied"}}, name)
        return made(name)

    target._client.get_paginator = refuse
    async with volume(tmp_path / "v") as v:
        await v.make(b"a", b"a")
        assert (await copy(VolumeSource(v.fs), target)).copied_files == 1
