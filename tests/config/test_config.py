from __future__ import annotations

from pathlib import Path

import pytest

from stashcordfs.config import (
    GIB,
    MIB,
    RELOADABLE,
    SETTING_HELP,
    SETTING_NAMES,
    Secret,
    Settings,
    format_size,
    load_settings,
)
from stashcordfs.errors import UsageError


@pytest.fixture
def env(tmp_path):
    return {"HOME": str(tmp_path)}


def toml(tmp_path, text: str, mode: int = 0o600) -> Path:
    path = tmp_path / ".config/stashcordfs/config.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def load(env, *, volume=None, config_file=None, **flags) -> Settings:
    return load_settings(flags, volume=volume, environ=env, config_file=config_file, is_root=False)


def test_defaults(env, tmp_path) -> None:
    settings = load(env)
    assert settings.state_dir == tmp_path / ".local/state/stashcordfs"
    assert settings.api_url == "https://discord.com/api/v10"
    assert settings.dirty_bytes == settings.cache_bytes // 2 == 5 * GIB
    assert settings.token is None
    assert settings.given == frozenset()
    assert load_settings(environ=env, is_root=True).state_dir == Path("/var/lib/stashcordfs")
    assert set(SETTING_HELP) == set(SETTING_NAMES) > RELOADABLE > {"token", "log_level"}


def test_flags_beat_environment_beats_volume_beats_global_beats_default(env, tmp_path) -> None:
    toml(tmp_path, "upload_delay_s = 1\n[volume.a]\nupload_delay_s = 2\n[volume.b]\ndedup=false\n")
    assert load(env).upload_delay_s == 1
    assert load(env, volume="a").upload_delay_s == 2
    assert load(env, volume="b").upload_delay_s == 1
    assert load(env, volume="b").dedup is False
    env["STASHCORDFS_UPLOAD_DELAY_S"] = "3"
    assert load(env, volume="a").upload_delay_s == 3
    settings = load(env, volume="a", upload_delay_s="4", log_level=None)
    assert settings.upload_delay_s == 4
    assert settings.given == {"upload_delay_s"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("64MiB", 64 * MIB),
        ("1.5 GiB", GIB * 3 // 2),
        ("1g", GIB),
        ("2GB", 2_000_000_000),
        (str(GIB), GIB),
        (GIB, GIB),
    ],
)
def test_sizes_are_read_with_their_units(env, text, value) -> None:
    assert load(env, cache_bytes=text).cache_bytes == value


def test_sizes_are_written_as_a_person_reads_them() -> None:
    sizes = (0, 5, 2048, MIB, 3 * GIB // 2, 2 << 40)
    assert [format_size(s) for s in sizes] == ["0", "5 B", "2 KiB", "1 MiB", "1.5 GiB", "2 TiB"]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("cache_bytes", "lots", "write a size"),
        ("cache_bytes", True, "write a size"),
        ("cache_bytes", "1 KiB", "from 64 MiB"),
        ("block_size", "3MiB", "power of two"),
        ("block_size", "4KiB", "power of two"),
        ("network_deadline_s", "soon", "a number from 1"),
        ("network_deadline_s", 0, "a number from 1"),
        ("upload_concurrency", "2.5", "a whole number from 1"),
        ("metrics_port", "70000", "a whole number from 0"),
        ("compression", "maybe", "true or false"),
        ("log_level", "loud", "one of debug, info"),
        ("state_dir", "", "path of a directory"),
        ("api_url", "discord.com", "a URL such as"),
        ("api_url", "https://me:pw@discord.com/api/v10", "user and password"),
        ("api_url", "http://discord.com/api/v10", "in clear"),
        ("token", "", "env:NAME"),
        ("dirty_bytes", "11GiB", "at most cache_bytes, 10 GiB"),
        ("upload_delay_max_s", 1, "at least upload_delay_s, 5"),
    ],
)
def test_a_bad_value_names_the_setting_and_what_to_write(env, name, value, says) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        load(env, **{name: value})
    assert name.replace("_", "-") in str(caught.value).replace("_", "-")


def test_a_longer_delay_raises_the_longest_one_that_was_not_given(env) -> None:
    assert load(env, upload_delay_s=600).upload_delay_max_s == 600
    assert load(env, upload_delay_s=1).upload_delay_max_s == 300


def test_loopback_may_be_without_tls(env) -> None:
    assert load(env, api_url="http://127.0.0.1:1/api/v10/").api_url == "http://127.0.0.1:1/api/v10"


def test_all_faults_come_together(env, tmp_path) -> None:
    toml(tmp_path, "cache_byte = 1\nzzz = 1\n[volume.a]\nlog_levl = 'info'\n")
    env["STASHCORDFS_UPLOAD_DELAY"] = "1"
    env["STASHCORDFS_METRICS_PORT"] = "x"
    env["STASHCORDFS_SANDBOX_THING"] = "not ours to judge"
    env["STASHCORDFS_RECOVERY_KEY"] = "known"
    with pytest.raises(UsageError) as caught:
        load(env, log_format="xml")
    text = str(caught.value)
    for part in (
        "cache_byte: unknown setting; did you mean cache_bytes?",
        "zzz: unknown setting; see README.md",
        "[volume.a] log_levl: unknown setting; did you mean log_level?",
        "STASHCORDFS_UPLOAD_DELAY: unknown; did you mean STASHCORDFS_UPLOAD_DELAY_S?",
        "STASHCORDFS_METRICS_PORT: write a whole number",
        "flag --log-format: write one of auto",
    ):
        assert part in text
    assert "SANDBOX_THING" not in text


def test_the_configuration_file_can_be_named_and_must_then_exist(env, tmp_path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("dedup = false")
    assert load(env, config_file=path).dedup is False
    assert load({**env, "STASHCORDFS_CONFIG": str(path)}).dedup is False
    with pytest.raises(UsageError, match="STASHCORDFS_CONFIG"):
        load({**env, "STASHCORDFS_CONFIG": str(tmp_path / "none")})


@pytest.mark.parametrize("text", ["a = [", "volume = 3", "[volume]\na = 1"])
def test_a_broken_file_is_a_fault(env, tmp_path, text) -> None:
    path = toml(tmp_path, text)
    with pytest.raises(UsageError, match=str(path)):
        load(env)


def test_a_file_that_holds_a_secret_must_be_private(env, tmp_path) -> None:
    toml(tmp_path, "[volume.a]\ntoken = 'abc'", mode=0o644)
    with pytest.raises(UsageError, match="token: others may read it; run chmod 600"):
        load(env)
    toml(tmp_path, "[volume.a]\ntoken = 'file:abc'", mode=0o644)
    assert load(env).token is None


def reveal(reference: str, **environ: str) -> str:
    return Secret(reference, name="token", environ=environ).reveal()


def test_secrets_come_from_where_their_reference_says(tmp_path) -> None:
    path = tmp_path / "t"
    path.write_text("from file\n")
    path.chmod(0o600)
    assert reveal("plain text") == "plain text"
    assert reveal("plain:env:X") == "env:X"
    assert reveal("env:X", X="from env") == "from env"
    assert reveal(f"file:{path}") == "from file"
    assert reveal("cmd:echo 'from  cmd'") == "from  cmd"
    path.chmod(0o644)  # systemd decides about the mode of its credentials
    assert reveal("credential:t", CREDENTIALS_DIRECTORY=str(tmp_path)) == "from file"


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("env:NONE", "token: the environment variable NONE is not set"),
        ("file:/none", "token: cannot read /none: No such file"),
        ("credential:x", "LoadCredential=x:PATH"),
        ("cmd:false --secret", r"command false failed \(it ended with 1\)"),
        ("cmd:/none", r"command /none failed \(No such file or directory\)"),
        ("cmd:printf '\\377'", r"command printf failed \(its answer is not text\)"),
        ("cmd:", "names no command"),
        ("cmd:pass 'x", "the command's quotes do not match"),
        ("cmd:true", "is empty"),
    ],
)
def test_a_secret_that_cannot_be_had_says_what_to_do(reference, says) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        reveal(reference)
    assert "--secret" not in str(caught.value)


def test_a_secret_file_must_be_private_and_text(tmp_path) -> None:
    path = tmp_path / "t"
    path.write_bytes(b"\xff\xfe")
    path.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        reveal(f"file:{path}")
    path.chmod(0o600)
    with pytest.raises(UsageError, match="not UTF-8"):
        reveal(f"file:{path}")


def test_a_secret_never_shows_itself(env, tmp_path) -> None:
    env |= {"STASHCORDFS_TOKEN": "hunter2", "STASHCORDFS_PASSPHRASE": "cmd:echo hunter2"}
    settings = load(env)
    assert settings.token is not None
    assert settings.token.reveal() == "hunter2"
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in str(settings.token)
    relative = Secret("file:a/b", name="token")
    assert relative.absolute_reference() == f"file:{Path.cwd()}/a/b"
    assert repr(relative) == "<Secret token file:a/b>"
