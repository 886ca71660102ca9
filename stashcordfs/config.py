"""Settings: flags > environment > TOML > defaults, read and checked once.

What it is: one frozen `Settings` that every part is built from, and `Secret`, a value that is
fetched when first needed and never shows itself. What it is not: a place that other rooms ask at
run time; SIGHUP builds a new `Settings` and the daemon applies what `RELOADABLE` names.

All faults are collected and reported together, each naming the setting and what to write.
"""

from __future__ import annotations

# ruff: noqa: RUF009  `_setting` returns a dataclasses.field, which is what belongs there
import difflib
import os
import re
import shlex
import subprocess
import tomllib
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from stashcordfs.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
PREFIX = "STASHCORDFS_"
_COMMAND_TIMEOUT_S = 60
_UNITS = {"": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}


class _Wrong(ValueError):
    """What to write instead, without the setting's name."""


class Secret:
    """A secret's reference, resolved when first revealed. Its text form never holds the value."""

    __slots__ = ("_environ", "_name", "_reference", "_value")

    def __init__(
        self, reference: str, *, name: str, environ: Mapping[str, str] = os.environ
    ) -> None:
        self._reference = reference
        self._name = name
        self._environ = environ
        self._value: str | None = None

    def __repr__(self) -> str:
        kind = self.kind
        shown = self._reference if kind in {"env", "file", "credential"} else f"{kind}:***"
        return f"<Secret {self._name} {shown}>"

    @property
    def kind(self) -> str:
        """Where it comes from: env, file, cmd, credential, or plain."""
        kind = self._reference.partition(":")[0]
        return kind if kind in {"env", "file", "cmd", "credential"} else "plain"

    def absolute_reference(self) -> str:
        """The reference of a file, for a process with another working directory."""
        return "file:" + os.path.abspath(  # noqa: PTH100  links are kept as given
            Path(self._reference.partition(":")[2]).expanduser()
        )

    def reveal(self) -> str:
        """Return the value; UsageError says what to do when it cannot be had."""
        if self._value is None:
            value = self._resolve().rstrip("\r\n")
            if not value:
                raise UsageError(f"{self._name}: {self!r} is empty")
            self._value = value
        return self._value

    def _resolve(self) -> str:
        rest = self._reference.partition(":")[2]
        match self.kind:
            case "env":
                if rest not in self._environ:
                    raise UsageError(f"{self._name}: the environment variable {rest} is not set")
                return self._environ[rest]
            case "file":
                return self._read(Path(rest).expanduser(), check_mode=True)
            case "credential":
                directory = self._environ.get("CREDENTIALS_DIRECTORY")
                if not directory:
                    raise UsageError(
                        f"{self._name}: credential:{rest} works only in a systemd service with "
                        f"LoadCredential={rest}:PATH"
                    )
                return self._read(Path(directory) / rest, check_mode=False)
            case "cmd":
                return self._run(rest)
        return self._reference.removeprefix("plain:")

    def _read(self, path: Path, *, check_mode: bool) -> str:
        try:
            if check_mode and path.stat().st_mode & 0o077:
                raise UsageError(
                    f"{self._name}: others may read {path}; run: chmod 600 {shlex.quote(str(path))}"
                )
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise UsageError(f"{self._name}: cannot read {path}: {reason}") from error

    def _run(self, command: str) -> str:
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise UsageError(f"{self._name}: the command's quotes do not match") from error
        if not words:
            raise UsageError(f"{self._name}: cmd: names no command")
        try:
            done = subprocess.run(
                words,
                stdout=subprocess.PIPE,
                check=True,
                timeout=_COMMAND_TIMEOUT_S,
                text=True,
            )
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            # The command line may hold secrets of its own: name the program only.
            raise UsageError(
                f"{self._name}: the command {words[0]} failed ({_why(error)}); "
                "run it by hand to see more"
            ) from error
        return done.stdout


def _why(error: Exception) -> str:
    """Why a command gave no secret. Never its words, which may be one."""
    match error:
        case subprocess.CalledProcessError():
            return f"it ended with {error.returncode}"
        case subprocess.TimeoutExpired():
            return f"no answer within {_COMMAND_TIMEOUT_S} s"
        case OSError():
            return error.strerror or type(error).__name__
    return "its answer is not text" if isinstance(error, UnicodeError) else type(error).__name__


def _size(low: int, high: int = 1 << 60) -> Callable[[object], int]:
    def parse(raw: object) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(raw).strip().lower())
        if isinstance(raw, bool) or match is None or match[2] not in _UNITS:
            raise _Wrong("write a size such as 500 MiB, 10 GiB or 1048576")
        value = int(float(match[1]) * _UNITS[match[2]]) if "." in match[1] else int(match[1])
        value = value if "." in match[1] else value * _UNITS[match[2]]
        if not low <= value <= high:
            raise _Wrong(f"write a size from {format_size(low)} to {format_size(high)}")
        return value

    return parse


def format_size(value: int) -> str:
    """A size as a person reads it, and as `_size` accepts it when it is exact."""
    for unit, size in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value} B" if value else "0"


def _block_size(raw: object) -> int:
    value = _size(1)(raw)
    if value & (value - 1) or not 64 * KIB <= value <= 8 * MIB:
        raise _Wrong("write a power of two from 64 KiB to 8 MiB")
    return value


def _number(low: float, high: float) -> Callable[[object], float]:
    def parse(raw: object) -> float:
        try:
            value = float(str(raw).removesuffix("s"))
        except ValueError:
            value = float("nan")
        if isinstance(raw, bool) or not low <= value <= high:
            raise _Wrong(f"write a number from {low:g} to {high:g}")
        return value

    return parse


def _integer(low: int, high: int) -> Callable[[object], int]:
    def parse(raw: object) -> int:
        value = int(str(raw)) if re.fullmatch(r"\d{1,18}", str(raw)) else -1
        if not low <= value <= high:
            raise _Wrong(f"write a whole number from {low} to {high}")
        return value

    return parse


def _boolean(raw: object) -> bool:
    text = str(raw).lower()
    if text in {"true", "on", "yes", "1"}:
        return True
    if text in {"false", "off", "no", "0"}:
        return False
    raise _Wrong("write true or false")


def _one_of(*choices: str) -> Callable[[object], str]:
    def parse(raw: object) -> str:
        if str(raw).lower() not in choices:
            raise _Wrong(f"write one of {', '.join(choices)}")
        return str(raw).lower()

    return parse


def _path(raw: object) -> Path:
    if not isinstance(raw, str | Path) or not str(raw):
        raise _Wrong("write the path of a directory")
    return Path(os.path.abspath(Path(raw).expanduser()))  # noqa: PTH100  links are kept as given


def _url(raw: object) -> str:
    text = str(raw).rstrip("/")
    parts = urlsplit(text)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query:
        raise _Wrong("write a URL such as https://discord.com/api/v10")
    if parts.username or parts.password:
        raise _Wrong("leave user and password out of the URL")
    loopback = parts.hostname in {"localhost", "::1"} or parts.hostname.startswith("127.")
    if parts.scheme == "http" and not loopback:
        raise _Wrong("write https://, since the token would travel in clear")
    return text


def _secret_text(raw: object) -> str:
    if not isinstance(raw, str) or not raw:
        raise _Wrong("write env:NAME, file:PATH, cmd:COMMAND, credential:NAME or the value itself")
    return raw


def _setting(
    default: Any, parse: Callable[[object], Any], says: str, *, reloadable: bool = False
) -> Any:
    metadata = {"parse": parse, "says": says, "reloadable": reloadable}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that can be set. `given` names what was not left to its default."""

    state_dir: Path = _setting(Path(), _path, "where volumes keep their local state")
    token: Secret | None = _setting(None, _secret_text, "the bot's token", reloadable=True)
    passphrase: Secret | None = _setting(None, _secret_text, "opens the volume's key")
    api_url: str = _setting("https://discord.com/api/v10", _url, "the API's base URL with version")
    cache_bytes: int = _setting(
        10 * GIB, _size(64 * MIB), "hard cap of the block cache", reloadable=True
    )
    min_free_bytes: int = _setting(
        GIB, _size(0), "local disk space that is left free", reloadable=True
    )
    dirty_bytes: int = _setting(
        0,
        _size(16 * MIB),
        "data not yet on Discord before writers wait (default: half of cache_bytes)",
        reloadable=True,
    )
    network_deadline_s: float = _setting(
        60.0, _number(1, 3600), "longest a read waits for the network, then EIO", reloadable=True
    )
    durability: str = _setting(
        "local",
        _one_of("local", "remote"),
        "where data is when an fsync returns: on this disk, or on Discord too",
        reloadable=True,
    )
    upload_delay_s: float = _setting(
        5.0, _number(0, 3600), "age at which written data is uploaded", reloadable=True
    )
    upload_delay_max_s: float = _setting(
        300.0, _number(0, 86400), "the same for data that is written again and again"
    )
    read_ahead_bytes: int = _setting(16 * MIB, _size(0, GIB), "largest read-ahead of one file")
    upload_concurrency: int = _setting(2, _integer(1, 16), "messages on their way at once")
    settle_delay_s: float = _setting(
        20.0,
        _number(0.1, 300),
        "time between the listings that settle an upload whose answer was lost",
    )
    metrics_port: int = _setting(
        0, _integer(0, 65535), "loopback port of /metrics and /health; 0: off"
    )
    log_level: str = _setting(
        "info",
        _one_of("debug", "info", "warning", "error"),
        "least severity that is logged",
        reloadable=True,
    )
    log_format: str = _setting(
        "auto", _one_of("auto", "text", "json"), "auto: text on a terminal and in a file"
    )
    block_size: int = _setting(MIB, _block_size, "unit of caching and sealing, fixed by mkfs")
    attr_timeout_s: float = _setting(
        3600.0, _number(0, 1e6), "how long the kernel keeps attributes"
    )
    max_file_bytes: int = _setting(2 * TIB, _size(MIB, 1 << 52), "largest file")
    max_size: int = _setting(
        0, _size(0), "most that the volume may hold, as du counts; 0: no bound", reloadable=True
    )
    compression: bool = _setting(True, _boolean, "zstd before sealing, where it helps")
    dedup: bool = _setting(True, _boolean, "store equal blocks once")
    history_days: float = _setting(
        7.0,
        _number(0, 3650),
        "days that deleted and overwritten content, and earlier states, can come back; 0: off",
    )
    gc_share: float = _setting(
        0.15, _number(0, 1), "share of all requests that collecting garbage may take; 0: none"
    )
    given: frozenset[str] = frozenset()


_FIELDS: dict[str, Field[Any]] = {f.name: f for f in fields(Settings) if f.name != "given"}
SETTING_NAMES = tuple(_FIELDS)
SETTING_HELP = {name: str(f.metadata["says"]) for name, f in _FIELDS.items()}
RELOADABLE = frozenset(name for name, f in _FIELDS.items() if f.metadata["reloadable"])


def load_settings(
    flags: Mapping[str, object] | None = None,
    *,
    volume: str | None = None,
    environ: Mapping[str, str] = os.environ,
    config_file: Path | None = None,
    is_root: bool | None = None,
) -> Settings:
    """Read all sources, for `volume` with its own section, or raise one UsageError with all faults.

    Flags that are None count as not given.
    """
    faults: list[str] = []
    layers = [
        ("flag --{}", {n: v for n, v in (flags or {}).items() if v is not None}),
        (PREFIX + "{}", _from_environment(environ, faults)),
        *_from_files(_config_files(environ, config_file), volume=volume, faults=faults),
    ]
    values: dict[str, Any] = {}
    for where, layer in layers:
        for name, raw in layer.items():
            if name in values:
                continue
            label = where.format(_spelling(where, name))
            try:
                values[name] = _FIELDS[name].metadata["parse"](raw)
            except _Wrong as wrong:
                # A later layer must not hide the fault, nor a secret show in it.
                values[name] = None
                faults.append(f"{label}: {wrong}")
    given = frozenset(values)
    if not faults:
        _complete(values, environ=environ, is_root=is_root, faults=faults)
    if faults:
        raise UsageError("; ".join(faults))
    return Settings(**values, given=given)


def _spelling(where: str, name: str) -> str:
    if where.startswith("flag"):
        return name.replace("_", "-")
    return name.upper() if where.startswith(PREFIX) else name


def _complete(
    values: dict[str, Any],
    *,
    environ: Mapping[str, str],
    is_root: bool | None,
    faults: list[str],
) -> None:
    """Fill defaults that depend on others, wrap secrets, check settings against each other."""
    root = os.geteuid() == 0 if is_root is None else is_root
    if "state_dir" not in values:
        home = environ.get("XDG_STATE_HOME") or str(_home(environ) / ".local/state")
        values["state_dir"] = Path("/var/lib" if root else home) / "stashcordfs"
    for name in ("token", "passphrase"):
        if name in values:
            values[name] = Secret(values[name], name=name, environ=environ)
    cache_bytes = values.get("cache_bytes", _FIELDS["cache_bytes"].default)
    if values.setdefault("dirty_bytes", cache_bytes // 2) > cache_bytes:
        faults.append(f"dirty_bytes: write at most cache_bytes, {format_size(cache_bytes)}")
    delay_s = values.get("upload_delay_s", _FIELDS["upload_delay_s"].default)
    default_max_s = max(delay_s, _FIELDS["upload_delay_max_s"].default)
    delay_max_s = values.setdefault("upload_delay_max_s", default_max_s)
    if delay_max_s < delay_s:
        faults.append(f"upload_delay_max_s: write at least upload_delay_s, {delay_s:g}")


def _home(environ: Mapping[str, str]) -> Path:
    return Path(environ["HOME"]) if environ.get("HOME") else Path("~").expanduser()


def _from_environment(environ: Mapping[str, str], faults: list[str]) -> dict[str, object]:
    """Our variables. Others with our prefix are left alone unless they look misspelt."""
    found: dict[str, object] = {}
    known_others = {"config", "recovery_key", "require_fuse", "new_passphrase"}
    for variable, value in environ.items():
        name = variable.removeprefix(PREFIX).lower()
        if not variable.startswith(PREFIX) or name in known_others:
            continue
        if name in _FIELDS:
            found[name] = value
        elif near := difflib.get_close_matches(name, SETTING_NAMES, n=1, cutoff=0.8):
            faults.append(f"{variable}: unknown; did you mean {PREFIX}{near[0].upper()}?")
    return found


def _config_files(environ: Mapping[str, str], config_file: Path | None) -> list[Path]:
    """The files to read, the strongest first."""
    named = config_file or environ.get(PREFIX + "CONFIG")
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise UsageError(f"{PREFIX}CONFIG: {path} is not a file; write the path of a TOML file")
        return [path]
    own = environ.get("XDG_CONFIG_HOME") or str(_home(environ) / ".config")
    candidates = [
        Path(own) / "stashcordfs/config.toml",
        Path("/etc/stashcordfs/config.toml"),
    ]
    return [path for path in candidates if path.is_file()]


def _from_files(
    paths: list[Path], *, volume: str | None, faults: list[str]
) -> list[tuple[str, dict[str, object]]]:
    """Two layers a file: the volume's section, then the global one."""
    layers: list[tuple[str, dict[str, object]]] = []
    for path in paths:
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            faults.append(f"{path}: cannot be read as TOML: {error}")
            continue
        sections = content.pop("volume", {})
        if not isinstance(sections, dict) or not all(
            isinstance(section, dict) for section in sections.values()
        ):
            faults.append(f"{path}: volume: write sections such as [volume.NAME]")
            continue
        named = cast("dict[str, dict[str, object]]", sections)
        where = f"{path}: {{}}"
        global_layer = _known(content, where=where, faults=faults)
        for name, section in named.items():
            inner = f"{path}: [volume.{name}] {{}}".replace("{}", "\0")
            inner = inner.replace("{", "{{").replace("}", "}}").replace("\0", "{}")
            layer = _known(section, where=inner, faults=faults)
            _check_readers(path, layer, faults)
            if name == volume:
                layers.append((inner, layer))
        _check_readers(path, global_layer, faults)
        layers.append((where, global_layer))
    return layers


def _known(section: Mapping[str, object], *, where: str, faults: list[str]) -> dict[str, object]:
    known: dict[str, object] = {}
    for name, value in section.items():
        if name in _FIELDS:
            known[name] = value
            continue
        near = difflib.get_close_matches(name, SETTING_NAMES, n=1)
        hint = f"did you mean {near[0]}?" if near else "see README.md for all settings"
        faults.append(f"{where.format(name)}: unknown setting; {hint}")
    return known


def _check_readers(path: Path, layer: Mapping[str, object], faults: list[str]) -> None:
    """A file that holds a secret itself must be its owner's alone."""
    for name in ("token", "passphrase"):
        value = layer.get(name)
        if isinstance(value, str) and Secret(value, name=name).kind == "plain":
            mode = path.stat().st_mode
            if mode & 0o077:
                faults.append(f"{path}: {name}: others may read it; run chmod 600 {path}")
