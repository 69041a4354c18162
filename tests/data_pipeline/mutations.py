"""Random damage for the fuzz tests: to shards, as bytes and as archives of arrays, and to JSON files, as text and as trees."""

import copy
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

BLOCK, RECORD = 512, 10240


@dataclass(frozen=True)
class Entry:
    """A tar member; `kind` is its type flag."""

    name: bytes
    data: bytes
    kind: bytes = b"0"
    link: bytes = b""
    mode: int = 0o644
    time: int = 0


def parse(data: bytes) -> list[Entry]:
    """Members of a well-formed shard."""
    entries, place = [], 0
    while (name := data[place : place + 100].rstrip(b"\0")) != b"":
        size = int(data[place + 124 : place + 135], 8)
        entries.append(Entry(name, data[place + BLOCK : place + BLOCK + size]))
        place += BLOCK + size + -size % BLOCK
    return entries


def archive(entries: list[Entry]) -> bytes:
    """The tar of the members: of what `parse` gave, the very same bytes."""
    data = b"".join(map(_member, entries)) + bytes(2 * BLOCK)
    return data + bytes(-len(data) % RECORD)


def _member(entry: Entry) -> bytes:
    header = entry.name[:100].ljust(100, b"\0") + b"%07o\0" % entry.mode + b"0000000\0" * 2
    header += b"%011o\0" % len(entry.data) + b"%011o\0" % entry.time + b" " * 8 + entry.kind
    header += entry.link[:100].ljust(100, b"\0") + b"ustar\00000"
    header = header.ljust(BLOCK, b"\0")
    checksum = b"%06o\0 " % sum(header)
    return header[:148] + checksum + header[156:] + entry.data + bytes(-len(entry.data) % BLOCK)


def damage_structure(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """A header's bit, a lost or a longer end, a block doubled or lost; what was done, and the result."""
    place, block = int(rng.integers(len(data))), BLOCK * int(rng.integers(len(data) // BLOCK))
    match int(rng.integers(5)):
        case 0:
            place = data.index(b"ustar", block % (len(data) // 2)) - 257 + int(rng.integers(BLOCK + 128))
            return f"bit of header byte {place}", flip(data, place, rng)
        case 1:
            return f"cut at {place}", data[:place]
        case 2:
            return "bytes added", data + rng.bytes(int(rng.integers(1, 2000)))
        case 3:
            return f"block {block} doubled", data[: block + BLOCK] + data[block:]
    return f"block {block} lost", data[:block] + data[block + BLOCK :]


def damage_contents(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """A bit or a few bytes anywhere, a block zeroed, or two blocks exchanged."""
    place, first, second = (
        int(rng.integers(len(data))),
        *(BLOCK * int(i) for i in rng.integers(len(data) // BLOCK, size=2)),
    )
    match int(rng.integers(4)):
        case 0:
            return f"bit of byte {place}", flip(data, place, rng)
        case 1:
            return f"block {first} zeroed", data[:first] + bytes(BLOCK) + data[first + BLOCK :]
        case 2:
            changed = bytearray(data)
            changed[first : first + BLOCK] = data[second : second + BLOCK]
            changed[second : second + BLOCK] = data[first : first + BLOCK]
            return f"blocks {first} and {second} exchanged", bytes(changed)
    return f"random bytes at {place}", (data[:place] + rng.bytes(40) + data[place + 40 :])[: len(data)]


def flip(data: bytes, place: int, rng: np.random.Generator) -> bytes:
    """The data with one bit of a byte changed."""
    return data[:place] + bytes([data[place] ^ 1 << int(rng.integers(8))]) + data[place + 1 :]


NAMES = (
    b"../../%s", b"/etc/%s", b"./%s", b"..\\%s", b"a/%s", b"%s ", b"%s/", b"%s\0hidden", b"000000000.%s", b"1%s",
    b"\xff%s", b"%s.gz", b"-rf %s", b"PaxHeaders.0/%s",
)  # fmt: skip
KINDS = (b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"\0", b"g", b"x", b"L", b"S", b"Z")


def damage_archive(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """Another name, type, order or number of members, or another array in one of them."""
    entries = parse(data)
    place, other = (int(i) for i in rng.choice(len(entries), 2, replace=False))
    entry = entries[place]

    def changed(**fields: Any) -> bytes:
        return archive([*entries[:place], replace(entry, **fields), *entries[place + 1 :]])

    match int(rng.integers(11)):
        case 0:
            name = NAMES[int(rng.integers(len(NAMES)))] % entry.name
            return f"{entry.name!r} called {name!r}", changed(name=name)
        case 1:
            kind = KINDS[int(rng.integers(len(KINDS)))]
            link = b"/etc/passwd" if rng.random() < 0.5 else entries[other].name
            return f"{entry.name!r} of type {kind!r}", changed(
                kind=kind, link=link, data=entry.data if rng.random() < 0.5 else b""
            )
        case 2:
            return f"{entry.name!r} missing", archive(entries[:place] + entries[place + 1 :])
        case 3:
            return f"{entry.name!r} twice", archive([*entries[: place + 1], *entries[place:]])
        case 4:
            entries[place], entries[other] = entries[other], entry
            return f"{entry.name!r} and {entries[place].name!r} exchanged", archive(entries)
        case 5:
            extra = Entry(entry.name.replace(b"000", b"777", 1), entry.data)
            return "a member added", archive([*entries[:place], extra, *entries[place:]])
        case 6:
            attributes = [{"mode": 0o777}, {"time": 1}, {"link": b"x"}][int(rng.integers(3))]
            return f"{entry.name!r} with {attributes}", changed(**attributes)
        case 7:
            return f"bytes behind the array of {entry.name!r}", changed(
                data=entry.data + rng.bytes(int(rng.integers(1, 600)))
            )
        case 8:
            return f"{entry.name!r} with the array of {entries[other].name!r}", changed(
                data=entries[other].data + b"\0"
            )
    what, array = damage_array(np.load(io.BytesIO(entry.data)), rng)
    return f"{entry.name!r}: {what}", changed(data=npy(array))


def damage_array(array: np.ndarray, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """An array of another type or shape, or a pickle."""
    if array.dtype.str == "<i4" and rng.random() < 0.5:
        return damage_lengths(array, rng)
    types = [
        name
        for name in ("<i8", "<f4", "<i4", "<u2", "<i2", "|u1", ">u2", ">i4", "|b1", "<c8", "|S2")
        if name != array.dtype.str
    ]
    match int(rng.integers(7)):
        case 0:
            name = types[int(rng.integers(len(types)))]
            return f"dtype {name}", array.astype(name)
        case 1:
            return "one element fewer", array[:-1]
        case 2:
            return "one element more", np.concatenate([array, array[:1]])
        case 3:
            return "one dimension more", array[None] if rng.random() < 0.5 else array[..., None]
        case 4:
            return "no dimension", array.reshape(-1)[0]
        case 5:
            return "a pickle", np.array([{"a": 1}, *array[1:].tolist()], dtype=object)
    return "structured", np.zeros(len(array), [("a", array.dtype), ("b", "u1")])


def damage_lengths(lengths: np.ndarray, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """Window lengths that are impossible or do not sum to what the row holds."""
    index, value = int(rng.integers(len(lengths))), (0, -1, -(2**31), 2**31 - 1, 1 << 16, 7)[int(rng.integers(6))]
    changed = lengths.copy()
    changed[index] = value if value != 7 else changed[index] + (1 if rng.random() < 0.5 else -1)
    return f"length {lengths[index]} -> {changed[index]}", changed


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    """The array as the contents of an .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), version, allow_pickle=True)
    return buffer.getvalue()


def damage_text(text: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """A JSON file that is broken as text: bits, ends, duplicate keys, numbers that JSON does not know, other encodings."""
    place = int(rng.integers(len(text)))
    keys = list(re.finditer(rb'"(\w+)":\s*', text))
    found = keys[int(rng.integers(len(keys)))]
    numbers = list(re.finditer(rb"(?<=[ :\[,])\d+(?=[,\n}\]])", text))
    number = numbers[int(rng.integers(len(numbers)))]
    match int(rng.integers(10)):
        case 0 | 1 | 2:
            return f"bit of byte {place}", flip(text, place, rng)
        case 3:
            return f"cut at {place}", text[:place]
        case 4:
            return f"{found[1]!r} twice", text[: found.start()] + found[0] + b"0, " + text[found.start() :]
        case 5:
            value = (b"NaN", b"Infinity", b"1e999", b"0x10", b"01", b"1_0", b"9" * 5000, b"-0")[int(rng.integers(8))]
            return f"number at {number.start()} is {value[:9]!r}", text[: number.start()] + value + text[number.end() :]
        case 6:
            return "deeply nested", text[: found.end()] + b"[" * 200_000 + text[found.end() :]
        case 7:
            return "bytes added", text + rng.bytes(5)
        case 8:
            return "another encoding", text.decode().encode(("utf-16", "utf-8-sig", "utf-32-be")[int(rng.integers(3))])
    other = (b"", b"null", b"[]", b"{}", b'"manifest"', b"\0" * len(text), text + text)
    return "another file", other[int(rng.integers(len(other)))]


def damage_tree(text: bytes, rng: np.random.Generator) -> tuple[str, Any]:
    """A JSON tree with a value changed, lost, added or moved."""
    tree = copy.deepcopy(json.loads(text))
    places = list(_places(tree))
    path, parent, key = places[int(rng.integers(len(places)))]
    value = parent[key]
    match int(rng.integers(8)):
        case 0:
            del parent[key]
            return f"{path} lost", tree
        case 1:
            if isinstance(parent, list):
                parent.insert(key, copy.deepcopy(value))
            else:
                parent[f"{key}_"] = value
            return f"{path} doubled", tree
        case 2:
            other_path, other_parent, other_key = places[int(rng.integers(len(places)))]
            parent[key], other_parent[other_key] = copy.deepcopy(other_parent[other_key]), copy.deepcopy(value)
            return f"{path} and {other_path} exchanged", tree
    values = _others(value)
    parent[key] = values[int(rng.integers(len(values)))]
    return f"{path}: {value!r:.40} -> {parent[key]!r:.40}", tree


def _places(tree: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, container, key) of every value below the root."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield f"{path}/{key}", tree, key
        if isinstance(value, (dict, list)):
            yield from _places(value, f"{path}/{key}")


def _others(value: Any) -> list[Any]:
    """Values of other types, and of the same type where that is more interesting."""
    near: list[Any] = []
    if isinstance(value, bool):
        near = [not value, int(value)]
    elif isinstance(value, (int, float)):
        near = [
            value + 1,
            value - 1,
            2 * value + 1,
            -value - 1,
            value * 1000,
            10**30,
            float(value),
            float("nan"),
            str(value),
        ]
    elif isinstance(value, str):
        near = [value + "x", value[:-1], "../" + value, value.upper(), "\ud800", value[::-1] or "y", "0" * 64]
    elif isinstance(value, list):
        near = [value[::-1] + value, value[:-1], [[]]]
    return near * 2 + [None, True, -1, 0.5, "x", [], {}, [value]]
