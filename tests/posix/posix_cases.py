"""All cases: those in cases/*.txt, and here those that come out of loops.

What POSIX and Linux say of each call, written for this project from the standards and the manual
pages; that they are right is shown by running them on a local disk first. The users are 65534 and
65533; as both are without capabilities, root alone has any.
"""

from __future__ import annotations

from pathlib import Path

from posix_calls import TYPES
from posix_language import Case, case, read_cases

NOT_FOLDERS = tuple(kind for kind in TYPES if kind != "dir")
FILES = tuple(kind for kind in NOT_FOLDERS if kind != "symlink")
ME, OTHER = 65534, 65533

# Calls on what exists at $p, and calls that make something there.
ON = (
    "chmod $p 0600", "chown $p 65534 65534", "lchown $p 65534 65534", "truncate $p 10",
    "open $p rdonly", "open $p rdwr", "stat $p size", "lstat $p size", "utimens $p 1 2",
    "unlink $p", "rename $p new", "link $p new", "setxattr $p user.a b", "getxattr $p user.a",
    "removexattr $p user.a", "listxattr $p", "rmdir $p", "list $p", "readlink $p", "rename2 $p f",
)  # fmt: skip
MAKING = (
    "create $p", "mkdir $p", "mkfifo $p", "mknod $p char", "mknod $p block", "mknod $p regular",
    "symlink target $p", "link f $p", "rename f $p", "rename2 f $p noreplace", "bind $p",
    "open $p creat,wronly",
)  # fmt: skip


def steps(*lines: str) -> str:
    return "\n".join(lines)


def at(call: str, path: str) -> str:
    return call.replace("$p", path)


def bad_paths(call: str) -> list[Case]:
    """What a call says of the path to its object, in the order of its components."""
    verb = call.split(maxsplit=1)[0]
    found = [
        *case(
            verb,
            f"a component that is no folder: {call}",
            steps(
                "make $t d",
                "create f",
                f"{at(call, 'd/name')} -> ENOTDIR",
                "lstat d type -> $t",
                "list . -> d,f",
            ),
            t=FILES,
        ),
        *case(
            verb,
            f"a component that is missing: {call}",
            steps("create f", f"{at(call, 'd/name')} -> ENOENT", "list . -> f"),
        ),
        *case(
            verb,
            f"a loop of links: {call}",
            steps(
                "create f",
                "symlink b a",
                "symlink a b",
                f"{at(call, 'a/name')} -> ELOOP",
                f"{at(call, 'b/name')} -> ELOOP",
            ),
        ),
        *case(
            verb,
            f"no right to search: {call}",
            steps(
                "mkdir d 0755",
                f"chown d {ME} {ME}",
                "create f",
                f"chown f {ME} {ME}",
                f"{ME}: create d/name",
                f"{ME}: setxattr d/name user.a b",
                f"{ME}: chmod d 0644",
                f"{ME}: {at(call, 'd/name')} -> EACCES",
                f"{OTHER}: {at(call, 'd/name')} -> EACCES",
                f"{ME}: chmod d 0755",
                "list d -> name",
            ),
        ),
    ]
    if verb != "bind":  # whose paths are 107 bytes at most, by another rule
        long = [f"{at(call, f'long:{size}')} -> ENAMETOOLONG" for size in (256, 1000, 1025, 2000)]
        long.append(f"{at(call, 'path:4096:name')} -> ENAMETOOLONG")
        found += case(verb, f"what is too long: {call}", steps("create f", *long, "list . -> f"))
    return found


def made(call: str) -> list[Case]:
    """What a call that makes something must check, and what comes of it."""
    verb = call.split(maxsplit=1)[0]
    found: list[Case] = []
    again = ["create f"] if verb.startswith("rename") else []
    if verb != "bind":
        found += case(
            verb,
            f"the longest name and path: {call}",
            steps(
                "create f",
                at(call, "long:255"),
                "lstat long:255 uid -> 0",
                "remove long:255",
                *again,
                at(call, "path:4095:name"),
                *(f"lstat path:{size}:name uid -> 0" for size in (1023, 1024, 4095)),
                "remove name",
            ),
        )
    if call not in {"open $p creat,wronly", "rename f $p"}:
        told = "EADDRINUSE" if verb == "bind" else "EEXIST"
        found += case(
            verb,
            f"a name that is taken: {call}",
            steps(
                "create f", "make $t name", f"{at(call, 'name')} -> {told}", "lstat name type -> $t"
            ),
            t=TYPES,
        )
    if verb in {"link", "rename", "rename2"} or "block" in call or "char" in call:
        return found
    return [
        *found,
        *case(
            verb,
            f"no right to write the folder: {call}",
            steps(
                "mkdir d 0755",
                f"chown d {ME} {ME}",
                f"{ME}: {at(call, 'd/a')}",
                f"{ME}: chmod d 0555",
                f"{ME}: {at(call, 'd/b')} -> EACCES",
                f"{OTHER}: {at(call, 'd/b')} -> EACCES",
                f"{ME}: chmod d 0755",
                f"{OTHER}: {at(call, 'd/b')} -> EACCES",
                "list d -> a",
            ),
        ),
        *case(
            verb,
            f"times, owner and group of what is made: {call}",
            steps(
                "mkdir d 0777",
                f"chown d {OTHER} {OTHER}",
                "tick",
                f"{ME}/{ME},{OTHER}: {at(call, 'd/a')}",
                "since d -> mc",
                "since d/a -> amc",
                f"lstat d/a uid,gid -> {ME},{ME}",
                "chmod d 02777",
                f"{ME}: {at(call, 'd/b')}",
                f"lstat d/b uid,gid -> {ME},{OTHER}",
            ),
        ),
    ]


def sticky() -> list[Case]:
    """Who may remove, rename and replace in a sticky folder: its owner, the file's, root."""
    found: list[Case] = []
    for folder, file, who, may in (
        (ME, ME, ME, True), (0, ME, ME, True), (ME, 0, ME, True), (ME, OTHER, ME, True),
        (OTHER, ME, ME, True), (OTHER, OTHER, ME, False), (0, OTHER, ME, False),
        (0, 0, ME, False), (OTHER, 0, ME, False), (0, OTHER, 0, True),
    ):  # fmt: skip
        of = f"of {folder}, a file of {file}, by {who}"
        actor, refused = (f"{who}: " if who else ""), ("" if may else " -> EPERM")
        begin = [
            "mkdir d 01777",
            "mkdir e 0777",
            "make $t d/n",
            f"lchown d/n {file} {file}",
            f"lchown d {folder} {folder}",
            f"lchown e {who} {who}",
        ]
        left = "ENOENT" if may else file
        found += case(
            "unlink",
            f"in a sticky folder {of}",
            steps(*begin, f"{actor}remove d/n{refused}", f"lstat d/n uid -> {left}"),
            t=TYPES,
        )
        # Whoever may not write a folder may not give it another parent: that changes its "..".
        moves = "" if may and not who else " -> 0 or EACCES" if may else refused
        found += case(
            "rename",
            f"out of a sticky folder {of}",
            steps(
                *begin,
                f"{actor}rename d/n e/n{moves}",
                f"{actor}rename d/n d/m -> {'0 or ENOENT' if may else 'EPERM'}",
            ),
            t=TYPES,
        )
        found += case(
            "rename",
            f"over something in a sticky folder {of}",
            steps(
                *begin,
                "make regular e/m",
                f"lchown e/m {who} {who}",
                f"{actor}rename e/m d/n{refused}",
            ),
            t=NOT_FOLDERS,
        )
    return found


def rights(bits: int) -> list[Case]:
    """One class of users at a time has the bits, the others have all: none may fall through."""
    found: list[Case] = []
    opened = [
        f"open n {how},nonblock -> {'0' if bits & need == need else 'EACCES'}"
        for how, need in (("rdonly", 4), ("wronly", 2), ("rdwr", 6))
    ]
    asked = [
        f"access n {letter} -> {'yes' if bits & bit else 'no'}"
        for letter, bit in (("r", 4), ("w", 2), ("x", 1))
    ]
    inside = [
        f"{call} -> {answer if bits & need == need else 'EACCES'}"
        for call, answer, need in (
            ("list d", "f", 4), ("stat d/f size", "0", 1), ("open d/f rdwr", "0", 1),
            ("create d/g", "0", 3), ("unlink d/f", "0", 3),
        )
    ]  # fmt: skip
    for shift, who in (
        (6, f"{ME}/7"), (3, f"{OTHER}/{ME}"), (3, f"{OTHER}/7,{ME}"), (0, f"{OTHER}/7"),
    ):  # fmt: skip
        mode = 0o777 & ~(7 << shift) | bits << shift
        begin = [f"lchown $n {ME} {ME}", f"chmod $n {mode:04o}"]
        found += case(
            "open",
            f"rights {mode:04o} for {who}",
            steps("create n", *begin, *(f"{who}: {line}" for line in opened + asked)),
            n="n",
        )
        found += case(
            "open",
            f"a folder's rights {mode:04o} for {who}",
            steps("mkdir d", "create d/f 0666", *begin, *(f"{who}: {line}" for line in inside)),
            n="d",
        )
    return found


def names() -> list[Case]:
    """Any bytes but two, and none is another's form."""
    odd = (
        "-", "\\", "\x01\x7f", "\u00e4", "\udcff\udcfe", "*?[", "...", ".hidden", "'\"", "e\u0301",
    )  # fmt: skip
    text = steps("create $n", "list . -> $n", "stat $n size -> 0", "unlink $n")
    alike = ("a", "A", "\u00e9", "e\u0301")
    return [
        *case("names", "any byte but two", text, n=odd),
        *case(
            "names",
            "differ by case and by normal form",
            steps(*(f"create {name}" for name in alike), f"list . -> {','.join(sorted(alike))}"),
        ),
    ]


CASES = [
    *(one for call in ON + MAKING for one in bad_paths(call)),
    *(one for call in MAKING for one in made(call)),
    *sticky(),
    *(one for bits in range(8) for one in rights(bits)),
    *names(),
    *(
        one
        for file in sorted(Path(__file__).with_name("cases").glob("*.txt"))
        for one in read_cases(file)
    ),
]
CASES.sort(key=lambda case: case.family)
