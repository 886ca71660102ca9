"""What a person sees: tables and progress, coloured and moving on a terminal, plain otherwise."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from stashcordfs.config import format_size
from stashcordfs.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    style: Callable[[Sequence[str]], str] = lambda _: "",
) -> None:
    """A table for a terminal; tab-separated lines with a header for a program.

    `style` names a row's colour. A cell is shown as it is: names of files may look like markup.
    """
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            click.echo("\t".join(row))
        return
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*map(escape, row), style=style(row))
    Console().print(table)


def follow(events: Iterable[dict[str, Any]], *, label: str) -> dict[str, Any]:
    """Show how `pending_bytes` falls, until the events end; return the last event."""
    last: dict[str, Any] = {}
    if not sys.stderr.isatty():
        for event in events:
            last = event
        return last
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[left]} left"),
        TimeElapsedColumn(),
        TextColumn("[red]{task.fields[trouble]}"),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task: TaskID | None = None
        most = 0
        for event in events:
            last = event
            pending = int(event.get("pending_bytes", 0))
            most = max(most, pending)
            if task is None:
                task = progress.add_task(label, total=None, left="", trouble="")
            progress.update(
                task,
                total=most or 1,
                completed=most - pending if most else 1,
                left=format_size(pending),
                trouble=str(event.get("last_error") or ""),
            )
    return last


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """Show how far each stage of a work is: what is done of how much. Only on a terminal."""
    if not sys.stderr.isatty():
        yield lambda _stage, _done, _total: None
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    progress.update(task, visible=False)
                tasks[stage] = progress.add_task(stage, total=total or None)
            progress.update(tasks[stage], completed=done, total=total or None)

        yield show


def read_secret(question: str, *, variable: str, confirm: bool = False) -> str:
    """Ask on the terminal, or return what the environment has. Without either it is wrong use."""
    given = os.environ.get(variable)
    if given:
        return given
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question}: set {variable}, since there is no terminal to ask on")
    answer: str = click.prompt(question, hide_input=True, confirmation_prompt=confirm, err=True)
    return answer


def parse_time(text: str) -> int:
    """A moment in ns: ISO 8601, local time unless it says otherwise; UsageError."""
    try:
        moment = datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        raise UsageError(f"--at {text!r}: write it as 2026-11-25T14:00 or 2026-11-25") from None
    return round(moment.timestamp() * 1e6) * 1000
