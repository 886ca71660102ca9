from __future__ import annotations

import io
import json
import logging

import pytest

from stashcordfs.ops.logging import Redactor, configure_logging


@pytest.fixture(autouse=True)
def _root_logger_as_before():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_text_lines_carry_level_logger_message_and_extras() -> None:
    out = io.StringIO()
    configure_logging(level="info", stream=out)
    logging.getLogger("a.b").info("mounted", extra={"pid": 7})
    logging.getLogger("a.b").debug("not shown")
    assert out.getvalue().endswith("INFO    a.b: mounted pid=7\n")
    assert out.getvalue().count("\n") == 1


def test_colours_only_on_a_terminal_and_not_with_no_color(monkeypatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for out, wanted in ((Terminal(), True), (io.StringIO(), False)):
        configure_logging(level="info", stream=out)
        logging.getLogger("x").warning("careful")
        assert ("\033[33m" in out.getvalue()) is wanted
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    configure_logging(level="info", stream=out)
    logging.getLogger("x").warning("careful")
    assert "\033" not in out.getvalue()


def test_json_lines_are_objects_with_exceptions() -> None:
    out = io.StringIO()
    configure_logging(level="info", log_format="json", stream=out)
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("x").exception("failed %d", 3)
    entry = json.loads(out.getvalue())
    assert entry["level"] == "error"
    assert entry["message"] == "failed 3"
    assert "ValueError: boom" in entry["exception"]
    assert entry["time"].endswith("Z")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_secret_never_gets_through_not_even_in_a_traceback(log_format: str) -> None:
    out = io.StringIO()
    token = 'tok"en\\1'
    configure_logging(
        level="debug", log_format=log_format, stream=out, redactor=Redactor(["", token])
    )
    try:
        raise ValueError(token)
    except ValueError:
        logging.getLogger("x").exception("with %r and %s", token, token, extra={"t": token})
    assert token not in out.getvalue()
    assert "en\\\\1" not in out.getvalue()
    assert "***" in out.getvalue()


def test_the_log_file_is_private_and_rotated(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("stashcordfs.ops.logging.LOG_BYTES", 200)
    path = tmp_path / "log"
    configure_logging(level="info", file=path)
    for number in range(20):
        logging.getLogger("x").info("line %d", number)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["log", "log.1", "log.2"]
    assert path.stat().st_mode & 0o777 == 0o600
