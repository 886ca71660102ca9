"""The rules against a model in plain Python: the same calls, the same answers, the same tree."""

from __future__ import annotations

import errno
import stat
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from stashcordfs.errors import FsError
from stashcordfs.journal import Journal
from stashcordfs.types import ROOT_INO, Ino


@dataclass(eq=False)
class Node:
    """A folder when it has `children`; `up` is a folder's only parent."""

    children: dict[bytes, Node] | None = None
    up: Node | None = None
    nlink: int = 1
    ino: Ino = field(default=ROOT_INO)


class Refused(Exception):
    pass


def need(condition: object, code: int) -> None:
    if not condition:
        raise Refused(code)


class Model:
    def __init__(self) -> None:
        self.root = Node({})
        self.nodes = [self.root]

    def folder(self, n: int) -> Node:
        node = self.nodes[n % len(self.nodes)]
        need(node.nlink, errno.ENOENT)
        need(node.children is not None, errno.ENOTDIR)
        return node

    def create(self, at: int, name: bytes, is_folder: bool) -> Node:
        folder = self.folder(at)
        need(name not in folder.children, errno.EEXIST)
        node = Node({} if is_folder else None, folder if is_folder else None)
        folder.children[name] = node
        self.nodes.append(node)
        return node

    def link(self, what: int, at: int, name: bytes) -> None:
        folder, node = self.folder(at), self.nodes[what % len(self.nodes)]
        need(node.nlink, errno.ENOENT)
        need(node.children is None, errno.EPERM)
        need(name not in folder.children, errno.EEXIST)
        folder.children[name] = node
        node.nlink += 1

    def remove(self, at: int, name: bytes, is_folder: bool) -> None:
        folder = self.folder(at)
        need(name in folder.children, errno.ENOENT)
        node = folder.children[name]
        if is_folder:
            need(node.children is not None, errno.ENOTDIR)
            need(not node.children, errno.ENOTEMPTY)
        else:
            need(node.children is None, errno.EISDIR)
        del folder.children[name]
        node.nlink -= 1

    def within(self, node: Node | None, ancestor: Node) -> bool:
        while node is not None and node is not ancestor:
            node = node.up
        return node is ancestor

    def rename(
        self, at: int, old: bytes, to: int, new: bytes, noreplace: bool, exchange: bool
    ) -> None:
        source, sink = self.folder(at), self.folder(to)
        need(old in source.children, errno.ENOENT)
        moved, target = source.children[old], sink.children.get(new)
        need(not (noreplace and exchange), errno.EINVAL)
        need(not (noreplace and target), errno.EEXIST)
        need(target or not exchange, errno.ENOENT)
        need(not self.within(sink, moved), errno.EINVAL)
        if exchange:
            need(not self.within(source, target), errno.EINVAL)
            self.place(source, old, target)
            self.place(sink, new, moved)
            return
        if moved is target:
            return
        if target is not None:
            need(moved.children is None or target.children is not None, errno.ENOTDIR)
            need(target.children is None or moved.children is not None, errno.EISDIR)
            need(not target.children, errno.ENOTEMPTY)
            target.nlink -= 1
        del source.children[old]
        self.place(sink, new, moved)

    def place(self, folder: Node, name: bytes, node: Node) -> None:
        folder.children[name] = node
        if node.children is not None:
            node.up = folder


NAMES = st.sampled_from([b"a", b"b", b"c"])
NUMBERS = st.integers(0, 30)


class Tree(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.place = tempfile.TemporaryDirectory()
        path = Path(self.place.name) / "j"
        self.journal = Journal.create(path, clock_ns=lambda: 0, uid=0, gid=0)
        self.model = Model()

    def teardown(self) -> None:
        self.journal.close()
        self.place.cleanup()

    def ask(self, call):
        """Run what never suspends."""
        try:
            call.send(None)
        except StopIteration as done:
            return done.value
        raise AssertionError("suspended")

    def ino(self, n: int) -> Ino:
        return self.model.nodes[n % len(self.model.nodes)].ino

    def both(self, call, expect, *arguments):
        try:
            expected, code = expect(*arguments), 0
        except Refused as refused:
            expected, code = None, refused.args[0]
        try:
            got, found = self.ask(call), 0
        except FsError as error:
            got, found = None, error.errno
        assert errno.errorcode.get(found) == errno.errorcode.get(code)
        return got, expected

    @rule(at=NUMBERS, name=NAMES, is_folder=st.booleans())
    def create(self, at, name, is_folder):
        mode = (stat.S_IFDIR if is_folder else stat.S_IFREG) | 0o700
        call = self.journal.create_node(self.ino(at), name, mode=mode, uid=0, gid=0, now_ns=1)
        n = at % len(self.model.nodes)
        got, node = self.both(call, self.model.create, n, name, is_folder)
        if node is not None:
            node.ino = got.ino

    @rule(what=NUMBERS, at=NUMBERS, name=NAMES)
    def link(self, what, at, name):
        call = self.journal.link(self.ino(what), self.ino(at), name, now_ns=1)
        self.both(call, self.model.link, what, at, name)

    @rule(at=NUMBERS, name=NAMES, is_folder=st.booleans())
    def remove(self, at, name, is_folder):
        remove = self.journal.rmdir if is_folder else self.journal.unlink
        call = remove(self.ino(at), name, now_ns=1)
        self.both(call, self.model.remove, at, name, is_folder)

    @rule(
        at=NUMBERS, old=NAMES, to=NUMBERS, new=NAMES,
        noreplace=st.sampled_from([False, False, True]), exchange=st.booleans(),
    )  # fmt: skip
    def rename(self, at, old, to, new, noreplace, exchange):
        call = self.journal.rename(
            self.ino(at), old, self.ino(to), new,
            noreplace=noreplace, exchange=exchange, now_ns=1,
        )  # fmt: skip
        self.both(call, self.model.rename, at, old, to, new, noreplace, exchange)

    @rule()
    def commit(self):
        self.journal.commit()

    @invariant()
    def the_same_tree(self):
        for node in self.model.nodes:
            found = self.ask(self.journal.getattr(node.ino))
            if node.children is None:
                assert found.nlink == node.nlink
                continue
            below = sum(child.children is not None for child in node.children.values())
            assert found.nlink == (below + 2 if node is self.model.root or node.nlink else 0)
            listed = self.ask(self.journal.read_dir(node.ino, 0, 100))
            names = {name: child.ino for name, child in node.children.items()}
            assert {name: a.ino for _, name, a in listed} == names
        nameless = {n.ino for n in self.model.nodes if not n.nlink}
        assert {left.ino for left in self.ask(self.journal.nameless())} == nameless


TestTree = Tree.TestCase
TestTree.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
