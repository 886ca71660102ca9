"""Damaging a journal behind the program's back, in every way that the tests and the table name."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import apsw

from stashcordfs.journal.sqlite.database import prepare_apsw

if TYPE_CHECKING:
    from pathlib import Path

PAGE = 4096


def edit(path: Path, *statements: str) -> None:
    """Change rows, as a faulty program or a flipped bit in memory would; pages stay sound."""
    prepare_apsw()
    connection = apsw.Connection(str(path))
    try:
        for statement in statements:
            connection.execute(statement)
    finally:
        connection.close()


def ask(path: Path, sql: str) -> list[tuple[Any, ...]]:
    prepare_apsw()
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def root_page(path: Path, name: str) -> int:
    """The first page of a table or index, counting from 1."""
    return ask(path, f"SELECT rootpage FROM sqlite_schema WHERE name = '{name}'")[0][0]


def leaf_page(path: Path, name: str) -> int:
    """A page of a table that holds rows: its root's leftmost child, or the root itself."""
    number = root_page(path, name)
    data = path.read_bytes()
    while data[(number - 1) * PAGE] in (2, 5):  # an interior page: its first cell leads down
        page = data[(number - 1) * PAGE : number * PAGE]
        cell = int.from_bytes(page[12:14], "big")
        number = int.from_bytes(page[cell : cell + 4], "big")
    return number


def zero_page(path: Path, number: int) -> None:
    with path.open("r+b") as file:
        file.seek((number - 1) * PAGE)
        file.write(bytes(PAGE))


def flip(path: Path, offset: int, mask: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def copy_journal(path: Path, to: Path) -> None:
    shutil.copyfile(path, to)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, but for what SQLite makes to look: shared memory and an empty WAL."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.name.endswith("-shm")
        if not (p.name.endswith("-wal") and not p.stat().st_size)
    }
