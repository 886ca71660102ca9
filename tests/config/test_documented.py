from __future__ import annotations

from pathlib import Path

import pytest

from stashcordfs.cli.main import COMMANDS
from stashcordfs.config import RELOADABLE, SETTING_NAMES

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SETTING_NAMES)
def test_every_setting_is_in_the_readme_with_its_reload_mark(name: str) -> None:
    assert f"| `{name}`{'¹' if name in RELOADABLE else ''} | " in README


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_readme(name: str) -> None:
    assert f"| `{name} " in README
