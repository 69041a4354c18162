"""What a checkpoint says of itself, in manifest.json: the step, the parameters with their states, and the hashes of every file.

A file's header, each state in it and its buffers have a hash each, so that whoever wants one state of four reads and checks that alone.

The file holds the hash of its own content, too. It is written last, so a checkpoint that has one is complete. It may come from
anywhere: it names files by a grammar, and sizes that the files are held against before anything is allocated (slices.py).
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from data_pipeline.core.errors import UserError
from data_pipeline.core.outside import parse_json, read_at_most
from pretrain.checkpoint.storage import Checkpoint, Folder
from pretrain.engine.parameter import Parameter

FORMAT = "textldm-checkpoint-3"
MANIFEST = "manifest.json"
BUFFER = "buffer"
"""Beside the states: what a stage holds besides its parameters. A slice's name begins with either."""

HASH_CHUNK_BYTES = 1 << 24
_FILE = r"^rank-[0-9]{5,}\.safetensors$"  # no separators: a manifest cannot point out of its folder
_Count = Annotated[int, Field(ge=0, lt=1 << 48)]


@dataclass(frozen=True)
class SavedPart:
    """Where a part of a file begins, its size, and its SHA-256."""

    begin: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SavedFile:
    """A file's parts: its header, and by state all slices of it; the buffers count as one."""

    header: SavedPart
    states: dict[str, SavedPart]

    @classmethod
    def of(cls, content: object) -> "SavedFile":
        """From what JSON has of it. Raises: ValidationError."""
        file = _File.model_validate(content)
        return cls(
            SavedPart(**dict(file.header)), {name: SavedPart(**dict(part)) for name, part in file.states.items()}
        )

    @property
    def bytes(self) -> int:
        """Of the whole file."""
        return sum(part.bytes for part in (self.header, *self.states.values()))

    def parts(self, state: str | None) -> list[SavedPart]:
        """All, or those of whoever reads one state: header and buffers, too."""
        return [self.header, *(part for name, part in self.states.items() if state is None or name in (state, BUFFER))]


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    `step`: steps done, so the next one is number `step`. `updates`: those of them that were not skipped. `parameters` by
    name. `aliases`: further names of tied parameters. `files` by name. `extra`: the caller's, anything in JSON.
    """

    step: int
    updates: int
    world_size: int
    zero_stage: int
    precision: str
    parameters: dict[str, Parameter]
    aliases: dict[str, str]
    files: dict[str, SavedFile]
    extra: dict[str, Any]
    versions: dict[str, str]
    format: str = FORMAT
    checkpoint: Checkpoint = field(default=Checkpoint(Folder("."), ""), compare=False)

    @property
    def states(self) -> list[str]:
        """Names of all states that any parameter has."""
        return list(dict.fromkeys(state for parameter in self.parameters.values() for state in parameter.states))

    @property
    def fingerprint(self) -> str:
        """Hash of all of the checkpoint's tensors: of the hashes of its files' parts."""
        return _digest({name: asdict(file) for name, file in self.files.items()})

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the manifest into the checkpoint, with the hash of its own content inside."""
        content = json.loads(json.dumps({f.name: _plain(getattr(self, f.name)) for f in fields(self)[:-1]}))
        text = json.dumps(content | {"sha256": _digest(content)}, indent=1)
        checkpoint.storage.put(checkpoint.name, MANIFEST, [text.encode()])

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a parameter."""
        return self.parameters[name].shape


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Part(_Strict):
    begin: _Count
    bytes: _Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class _File(_Strict):
    header: _Part
    states: dict[str, _Part]


class _Parameter(_Strict):
    shape: list[_Count] = Field(max_length=8)
    decays: bool
    states: list[str]


class _Content(_Strict):
    """What manifest.json may hold."""

    step: NonNegativeInt
    updates: NonNegativeInt
    world_size: NonNegativeInt
    zero_stage: NonNegativeInt
    precision: str
    parameters: dict[str, _Parameter]
    aliases: dict[str, str]
    files: dict[Annotated[str, Field(pattern=_FILE)], _File]
    extra: dict[str, Any]
    versions: dict[str, str]
    format: str


def read_manifest(checkpoint: Checkpoint) -> Manifest:
    """The manifest of a checkpoint, its own hash checked. Raises: UserError with the reason."""
    try:
        with checkpoint.read(MANIFEST) as file:
            content = parse_json(read_at_most(file))
        stated = content.pop("sha256")
        if content.get("format") != FORMAT:
            raise UserError(f"{checkpoint} has format {content.get('format')!r}; this version reads {FORMAT!r}")
        if stated != _digest(content):
            raise UserError(f"{checkpoint}/{MANIFEST} was altered: its content does not have the hash that it states")
        checked = _Content.model_validate(content)
        files = {name: SavedFile.of(file) for name, file in checked.files.items()}
        parameters = {
            name: Parameter(tuple(saved.shape), saved.decays, tuple(saved.states))
            for name, saved in checked.parameters.items()
        }
        return Manifest(**dict(checked) | {"files": files, "parameters": parameters}, checkpoint=checkpoint)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{checkpoint}/{MANIFEST} is not what training writes: {place}: {first['msg']} (found {first['input']!r:.80})"
        ) from None
    except FileNotFoundError:
        raise UserError(
            f"{checkpoint} has no {MANIFEST}: the save was not finished, or this is not a checkpoint"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{checkpoint}/{MANIFEST} cannot be read: {error}") from None


def unaltered(checkpoint: Checkpoint, state: str | None = None) -> Manifest:
    """The manifest of a checkpoint whose files are as it says, see `check_hashes`. Raises: UserError."""
    manifest = read_manifest(checkpoint)
    check_sizes(manifest)
    check_hashes(manifest, state)
    return manifest


def check_sizes(manifest: Manifest) -> None:
    """Every file is there in its stated size. Raises: UserError naming the file."""
    for name, stated in manifest.files.items():
        try:
            with manifest.checkpoint.read(name) as file:
                size = file.seek(0, 2)
        except FileNotFoundError:
            raise UserError(f"{manifest.checkpoint}/{name} is missing") from None
        if size != stated.bytes:
            raise UserError(f"{manifest.checkpoint}/{name} has {size} bytes, the manifest says {stated.bytes}")


def check_hashes(manifest: Manifest, state: str | None = None, share: int = 0, shares: int = 1) -> None:
    """The files have the stated SHA-256, a core each.

    Args:
        state: checked with the headers and buffers, which its readers need too; all states when None.
        share, shares: files number `share`, `share` + `shares`, ... alone.

    Raises: UserError naming the file.
    """
    names = sorted(manifest.files)[share::shares]
    parts = [(name, part) for name in names for part in manifest.files[name].parts(state)]

    def check(named: tuple[str, SavedPart]) -> None:
        name, part = named
        digest, left = hashlib.sha256(), part.bytes
        with manifest.checkpoint.read(name) as file:
            file.seek(part.begin)
            while left and (chunk := file.read(min(left, HASH_CHUNK_BYTES))):
                digest.update(chunk)
                left -= len(chunk)
        if digest.hexdigest() != part.sha256:
            raise UserError(f"{manifest.checkpoint}/{name} was altered: its SHA-256 is not the one in the manifest")

    with ThreadPoolExecutor(max(1, min(len(parts), len(os.sched_getaffinity(0)) // shares))) as pool:
        for _ in pool.map(check, parts):
            pass


def _plain(value: Any) -> Any:
    """Dataclasses in a dictionary as dictionaries."""
    if isinstance(value, dict):
        return {
            name: asdict(inner) if isinstance(inner, Parameter | SavedFile) else inner for name, inner in value.items()
        }
    return value


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
