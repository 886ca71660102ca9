"""Numbers in sealed tables: unsigned LEB128, below 2^64, one encoding each. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from stashcordfs.errors import ObjectCorrupt


def put_numbers(out: bytearray, *numbers: int) -> None:
    """Append numbers: seven bits a byte, lowest first."""
    for number in numbers:
        left = number
        if not 0 <= left < 1 << 64:
            raise ValueError("a table holds numbers of 64 bits")
        while left > 0x7F:
            out.append(left & 0x7F | 0x80)
            left >>= 7
        out.append(left)


@dataclass(slots=True)
class Reader:
    """Reads what was put. ObjectCorrupt, naming `what`, at anything that would not be put so."""

    data: bytes
    what: str
    at: int = field(default=0)

    def take(self, count: int) -> bytes:
        """So many bytes as they are."""
        if count > len(self.data) - self.at:
            raise ObjectCorrupt(f"{self.what} ends early")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self) -> int:
        """One number."""
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                if value >= 1 << 64 or (byte == 0 and shift > 7):
                    break
                return value
            if shift > 63:
                break
        raise ObjectCorrupt(f"{self.what} has a badly written number")

    def count(self) -> int:
        """A count of things that take a byte each at least: a hostile one is refused early."""
        value = self.number()
        if value > len(self.data) - self.at:
            raise ObjectCorrupt(f"{self.what} claims more entries than it has bytes")
        return value

    def at_end(self) -> bool:
        """Whether everything was read."""
        return self.at == len(self.data)

    def end(self) -> None:
        """ObjectCorrupt unless everything was read."""
        if not self.at_end():
            raise ObjectCorrupt(f"{self.what} has bytes after its end")
