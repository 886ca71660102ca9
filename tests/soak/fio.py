"""`fio --verify` on the mount: what each job has written is read back and compared, then once more
by a mount without local data.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).resolve().parents[1] / "support")]
from mounted import DemoVolume

# by name: fio's options; of each a run writes `size` in all
JOBS: dict[str, tuple[str, ...]] = {
    "sequential": ("--rw=write", "--bs=1m", "--ioengine=psync"),
    "random": ("--rw=randwrite", "--bs=4k", "--ioengine=psync", "--fdatasync=64"),
    "mixed": ("--rw=randrw", "--bsrange=1k-256k", "--ioengine=psync"),
    "mapped": ("--rw=randwrite", "--bs=4k", "--ioengine=mmap"),
    "direct": ("--rw=randwrite", "--bs=64k", "--ioengine=psync", "--direct=1"),
    "direct-async": ("--rw=randrw", "--bs=16k", "--ioengine=libaio", "--iodepth=16", "--direct=1"),
    "four-at-once": ("--rw=randwrite", "--bsrange=4k-128k", "--ioengine=psync", "--numjobs=4"),
    "backwards": ("--rw=write:-8k", "--bs=4k", "--ioengine=psync"),
    "vectors": ("--rw=randrw", "--bs=32k", "--ioengine=pvsync2"),
}
# fio's --verify_only loses its place when it goes backwards, on any file system (EIO, "full resid")
_NOT_AGAIN = frozenset({"backwards"})
_VERIFY = ("--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_backlog=0")


@dataclass
class Result:
    seed: int
    size: str
    version: str = ""
    jobs: dict[str, int] = field(default_factory=dict)  # how often each has run
    written_bytes: int = 0
    read_bytes: int = 0
    rounds: int = 0
    load_s: int = 0
    again_bytes: int = 0  # verified with nothing kept locally
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


class Fio:
    def __init__(self, volume: DemoVolume, result: Result) -> None:
        self._volume = volume
        self._result = result

    def one(self, name: str, *more: str) -> None:
        """A job, with its verification. `--verify_only` does that alone."""
        result = self._result
        place = self._volume.mountpoint / name
        place.mkdir(exist_ok=True)
        command = ["fio", f"--name={name}", f"--directory={place}", f"--size={result.size}"]
        command += ["--output-format=json", f"--randseed={result.seed + result.rounds}"]
        command += ["--fallocate=none", *JOBS[name], *_VERIFY, *more]
        done = subprocess.run(
            command, cwd="/tmp", capture_output=True, text=True, timeout=1200, check=False
        )
        told = done.stdout[done.stdout.find("{") :]
        if done.returncode or not told.startswith("{"):
            words = (done.stderr + done.stdout)[-1500:]
            result.problems.append(f"{name} {' '.join(more)}: fio ended: {words}")
            return
        jobs = json.loads(told)["jobs"]
        result.problems += [f"{name}: error {j['error']}" for j in jobs if j["error"]]
        read = sum(job["read"]["io_bytes"] for job in jobs)
        if more:
            result.again_bytes += read
        else:
            result.jobs[name] = result.jobs.get(name, 0) + 1
            result.written_bytes += sum(job["write"]["io_bytes"] for job in jobs)
            result.read_bytes += read


def soak_fio(
    folder: Path, *, minutes: float, seed: int, size: str = "64m", jobs: tuple[str, ...] = ()
) -> Result:
    """Rounds of all jobs until so many minutes have passed, one round at least."""
    result = Result(seed, size)
    version = ["fio", "--version"]
    result.version = subprocess.run(version, capture_output=True, text=True, check=True).stdout
    names = jobs or tuple(JOBS)
    end = time.monotonic() + minutes * 60
    settings = {"cache_bytes": str(128 << 20)}
    with DemoVolume.running(folder, settings=settings, server=("--no-rate-limits",)) as volume:
        fio = Fio(volume, result)
        while not result.rounds or time.monotonic() < end:
            begun = time.monotonic()
            for name in names:
                fio.one(name)
                print(json.dumps({name: result.jobs.get(name)}), flush=True)
            result.load_s += round(time.monotonic() - begun)
            volume.remount(without_cache=True)
            for name in names:
                if name not in _NOT_AGAIN:
                    fio.one(name, "--verify_only")
            result.rounds += 1
    return result
