"""Cases as text, expanded over their variants, and what runs them. `posix_calls` has the steps.

== chmod: changes ctime alone          family: title
$t = NOT-SYMLINK                        a variable: the case is run for each of its values
make $t n                               steps, see posix_calls
tick
chmod n 0111
since n -> c | mc  # a reason           answers: anywhere | on the mount, if that is another
"""

from __future__ import annotations

import itertools
import os
import shutil
import string
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from posix_calls import TYPES, Calls, acting

_SETS = {
    "TYPES": TYPES,
    "NOT-DIR": tuple(kind for kind in TYPES if kind != "dir"),
    "NOT-SYMLINK": tuple(kind for kind in TYPES if kind != "symlink"),
    "FILES": tuple(kind for kind in TYPES if kind not in {"dir", "symlink"}),
}


@dataclass(frozen=True)
class Step:
    """One call. `mount` is what a mount answers where the binding can't do better."""

    text: str
    who: tuple[int, int, tuple[int, ...]] | None
    verb: str
    args: tuple[str, ...]
    expected: str
    mount: str


@dataclass(frozen=True)
class Case:
    """Steps in a fresh folder."""

    family: str
    title: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Difference:
    case: Case
    step: Step
    found: str

    def __str__(self) -> str:
        return f"{self.case.family}: {self.case.title}: {self.step.text}: {self.found}"


def case(family: str, title: str, text: str, **variants: object) -> list[Case]:
    """Cases for all combinations of the variants: `$name` in the text is replaced."""
    made = []
    names = list(variants)
    choices = [value if isinstance(value, tuple) else (value,) for value in variants.values()]
    for chosen in itertools.product(*choices):
        given = {name: str(value) for name, value in zip(names, chosen, strict=True)}
        filled = string.Template(text).substitute(given)
        steps = tuple(_step(line) for line in filled.splitlines() if line.strip())
        of = ", ".join(given.values())
        made.append(Case(family, f"{title} ({of})" if of else title, steps))
    return made


def read_cases(file: Path) -> list[Case]:
    """The cases of a text file."""
    made: list[Case] = []
    for block in file.read_text(encoding="utf-8").split("== ")[1:]:
        head, *lines = block.splitlines()
        family, _, title = head.partition(": ")
        variables = [line[1:].split(" = ") for line in lines if _is_variable(line)]
        variants = {name: _SETS.get(values) or tuple(values.split()) for name, values in variables}
        body = "\n".join(line for line in lines if not _is_variable(line))
        made += case(family, title, body, **variants)
    return made


def _is_variable(line: str) -> bool:
    return line.startswith("$") and " = " in line


def _step(line: str) -> Step:
    text = line.partition(" # ")[0].strip()
    call, arrow, told = text.partition(" -> ")
    expected, _, mount = told.partition(" | ")
    who = None
    words = call.split()
    if words[0].endswith(":") and words[0][0].isdigit():
        who = _who(words.pop(0).removesuffix(":"))
    expected = expected.strip() if arrow else "0"
    return Step(text, who, words[0], tuple(words[1:]), expected, mount.strip() or expected)


def _who(text: str) -> tuple[int, int, tuple[int, ...]]:
    uid, _, groups = text.partition("/")
    gid, *others = (int(group) for group in (groups or uid).split(","))
    return int(uid), gid, (gid, *others)


def run_case(case: Case, folder: Path, *, on_mount: bool) -> Iterator[Difference]:
    """Run in a folder of its own below `folder`; each step whose answer was not the expected."""
    place = folder / "case"
    place.mkdir()
    place.chmod(0o755)
    os.chdir(place)
    mask = os.umask(0)
    calls = Calls()
    try:
        for step in case.steps:
            wanted = step.mount if on_mount else step.expected
            found = _run_step(calls, step)
            if found not in wanted.split(" or "):
                yield Difference(case, step, f"{found} instead of {wanted}")
    finally:
        os.umask(mask)
        calls.close()
        os.chdir(folder)
        shutil.rmtree(place)


def _run_step(calls: Calls, step: Step) -> str:
    if step.who is None:
        return calls.run(step.verb, list(step.args))
    with acting(*step.who):
        return calls.run(step.verb, list(step.args))


@dataclass(frozen=True)
class Outcome:
    """Of one family: how many steps were checked, what differed, how long it took in s."""

    cases: int
    steps: int
    differences: list[Difference]
    took_s: float


def run_all(cases: list[Case], folder: Path, *, on_mount: bool) -> dict[str, Outcome]:
    """All cases by family. The working directory is left as it was."""
    before = Path.cwd()
    outcomes: dict[str, Outcome] = {}
    try:
        for family, group in itertools.groupby(cases, key=lambda case: case.family):
            members = list(group)
            started = time.perf_counter()
            found = [d for one in members for d in run_case(one, folder, on_mount=on_mount)]
            steps = sum(len(one.steps) for one in members)
            took_s = time.perf_counter() - started
            outcomes[family] = Outcome(len(members), steps, found, took_s)
    finally:
        os.chdir(before)
    return outcomes
