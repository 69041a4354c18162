"""The work behind `cache_features`: one teacher over one prepared folder, shard by shard."""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from tqdm import tqdm

from data_pipeline.core.errors import UserError
from data_pipeline.core.keys import generator
from data_pipeline.core.storage import remove_unfinished, write_text
from data_pipeline.features import codec_choice
from data_pipeline.features.cache import CODEC_NAME, JOB_NAME, feature_members, member_infos, tile
from data_pipeline.features.codec import Codec, load_codec
from data_pipeline.features.codec_choice import FeatureSample, Fidelity, Target
from data_pipeline.features.teacher import Teacher
from data_pipeline.features.teacher_fit import check_fit
from data_pipeline.features.teacher_loading import load_teacher
from data_pipeline.format.manifest import MANIFEST_NAME, SPLITS, FeatureManifest, FeatureShardInfo, Manifest, ShardInfo
from data_pipeline.format.shards import shard_bytes, write_shard
from data_pipeline.reading.order import Span
from data_pipeline.reading.shard_pool import TokenRows

# Rows are read and encoded in pieces of about this many tokens; a constant, since it decides which windows are batched
# together and thereby the last bits of the features: a resumed run must write the same bytes.
CHUNK_TOKENS = 65536


@dataclass(frozen=True)
class CodecOptions:
    """Which codec is wanted."""

    target: Target = field(default_factory=Target)
    ngram_orders: tuple[int, ...] = (0, 1, 2, 3)
    rank: int | None = None
    bits: int | None = None
    exact: bool = False
    sample_tokens: int = 200_000

    def __post_init__(self) -> None:
        if self.exact and (self.rank or self.bits):
            raise UserError("--exact stores the features as they are: leave --rank and --bits out")


@dataclass
class FeatureJob:
    """Teacher, tokens and output folder of one cache."""

    data: str
    tokens: Manifest
    output: Path
    teacher: Teacher
    options: CodecOptions

    @classmethod
    def open(
        cls,
        data: str,
        output: Path,
        teacher: str,
        revision: str | None,
        layer: int,
        dtype: str,
        device: torch.device,
        token_budget: int,
        options: CodecOptions,
    ) -> "FeatureJob":
        """Load the manifest and the teacher; UserError if they do not fit each other."""
        tokens = Manifest.load(data)
        loaded = load_teacher(teacher, layer, revision, dtype, token_budget)
        check_fit(loaded, data, tokens)
        return cls(data, tokens, output, loaded.to(device), options)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the bytes of the cache (but for rounding on other machines); another job's folder differs in it."""
        return {
            "tokens_fingerprint": self.tokens.fingerprint,
            "teacher": self.teacher.describe() | {"tokenizer_sha256": self.tokens.tokenizer.sha256},
            "options": json.loads(json.dumps(asdict(self.options))),
        }

    @property
    def shards(self) -> list[tuple[str, int, ShardInfo]]:
        """(split, index, token shard) in the order in which ranks take them."""
        return [(split, i, shard) for split in SPLITS for i, shard in enumerate(self.tokens.splits[split])]

    @property
    def num_tokens(self) -> int:
        """Tokens in windows."""
        return sum(shard.tokens for _, _, shard in self.shards)

    @property
    def num_places(self) -> int:
        """Tokens with the unfilled tails of rows, which the cache stores too."""
        return self.tokens.row_tokens * sum(shard.rows for _, _, shard in self.shards)

    def codec_for(self, rank: int, world_size: int, timeout_s: float, report_only: bool = False) -> Codec | None:
        """The codec of this cache: a former run's, fitted now by rank 0, or waited for by the others."""
        if rank == 0:
            codec = self._known_codec()
            if codec is None:
                return self._fit(world_size, report_only)
            fidelity = Fidelity(**json.loads((self.output / JOB_NAME).read_text())["fidelity"])
            print("\n".join(self.report(codec, fidelity)), flush=True)
            return codec
        if report_only:
            return None
        give_up = time.monotonic() + timeout_s
        while (codec := self._known_codec()) is None:
            if time.monotonic() > give_up:
                raise UserError(
                    f"rank {rank} waited {timeout_s:.0f} s for rank 0 to write {self.output / JOB_NAME}; look for "
                    "rank 0's error, check that all machines see the same folder, or raise --timeout"
                )
            time.sleep(0.5)
        return codec

    def _known_codec(self) -> Codec | None:
        """The codec in the folder if it was fitted for this very job; UserError if the folder holds another one."""
        path = self.output / JOB_NAME
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}): delete {self.output} and start again") from error
        differing = [key for key, value in self.identity.items() if found.get(key) != value]
        if differing:
            key = differing[0]
            raise UserError(
                f"{self.output} holds features of another job: {key} is {found.get(key)} there and "
                f"{self.identity[key]} here; delete the folder or give another --output"
            )
        codec = load_codec(self.output / CODEC_NAME)
        if codec.fingerprint() != found["codec_fingerprint"]:
            raise UserError(
                f"{self.output / CODEC_NAME} is not the codec of {path}: delete {self.output} and start again"
            )
        return codec

    def _fit(self, world_size: int, report_only: bool) -> Codec:
        """Fit the codec to a sample, report what the cache will be, and leave codec and job for everyone."""
        started = time.monotonic()
        sample = self.sample()
        teacher_s = time.monotonic() - started
        options = self.options
        table: list[Fidelity] = []
        codec: Codec
        if options.exact:
            codec, fidelity = codec_choice.exact(sample, self.teacher.dtype)
        elif options.rank or options.bits:
            codec, fidelity = codec_choice.fit(sample, options.rank, options.bits or 8, max(options.ngram_orders))
        else:
            codec, fidelity, table = codec_choice.choose(sample, options.target, options.ngram_orders, self.num_places)
        started = time.monotonic()
        codec.encode(sample.features_TF, sample.tokens_T, sample.window_lengths)
        tokens_per_s = world_size * len(sample.tokens_T) / (teacher_s + time.monotonic() - started)
        print("\n".join(self.report(codec, fidelity, table, tokens_per_s)), flush=True)
        if not report_only:
            self.keep(codec, fidelity)
        return codec

    def keep(self, codec: Codec, fidelity: Fidelity) -> None:
        """Write codec and job, which the other ranks wait for and a resumed run goes on with."""
        self.output.mkdir(parents=True, exist_ok=True)
        for name in (CODEC_NAME, JOB_NAME):
            remove_unfinished(self.output, name)
        codec.save(self.output / CODEC_NAME)
        job = self.identity | {
            "codec_fingerprint": codec.fingerprint(),
            "fidelity": asdict(fidelity),
        }
        write_text(self.output / JOB_NAME, json.dumps(job, indent=2, sort_keys=True))

    def cache_bytes(self, codec: Codec) -> int:
        """Size of the whole cache: its shards, and the codec."""
        members = feature_members(codec, self.tokens.row_tokens)
        return codec.own_bytes + sum(shard_bytes(members, shard.rows) for _, _, shard in self.shards)

    def report(
        self, codec: Codec, fidelity: Fidelity, table: Sequence[Fidelity] = (), tokens_per_s: float | None = None
    ) -> Iterator[str]:
        """Lines: the table of codecs, the chosen one, the size of everything and, where the speed is known, the time that
        it will take.
        """
        if table:
            yield f"    {Fidelity.header()}"
            yield from (f"{' -> ' if row == fidelity else '    '}{row}" for row in table)
        yield (
            f"codec: {fidelity.bytes_per_token:.0f} bytes/token ({fidelity.bf16_ratio:.4f} of bfloat16), cosine mean "
            f"{fidelity.mean_cosine:.6f}, 1st percentile {fidelity.p1_cosine:.6f}, "
            f"variance kept {fidelity.explained:.4f}"
        )
        time_needed = ""
        if tokens_per_s is not None:
            time_needed = f", about {format_seconds(self.num_tokens / tokens_per_s)} at {tokens_per_s:,.0f} tokens/s"
        yield (
            f"cache: {self.num_tokens:,} tokens in {len(self.shards)} shards, {format_bytes(self.cache_bytes(codec))} "
            f"({format_bytes(codec.own_bytes)} of it the codec){time_needed}"
        )

    def sample(self, split: str = "train") -> FeatureSample:
        """Features of random rows of a split, about `sample_tokens` tokens."""
        shards = self.tokens.splits[split]
        rows = [(index, row) for index, shard in enumerate(shards) for row in range(shard.rows)]
        wanted = min(len(rows), max(1, round(self.options.sample_tokens / self.tokens.row_tokens)))
        rng = generator("feature codec sample", self.tokens.seed)
        chosen = sorted(rng.choice(len(rows), size=wanted, replace=False).tolist())
        reader = TokenRows(self.data, self.tokens, split, verify=False)
        tokens, lengths = [], []
        for index in rng.permutation(chosen).tolist():  # shuffled, so that its parts are alike
            shard, row = rows[index]
            tokens_1R, windows = reader.read(Span(0, shard, row, row + 1))
            lengths += windows[0].tolist()
            tokens.append(tokens_1R[0, : int(windows[0].sum())].astype(np.int64))
        tokens_T = torch.from_numpy(np.concatenate(tokens)).to(self.teacher.device)
        features_TF = self.teacher.features(tokens_T, lengths)
        return FeatureSample(features_TF, tokens_T, lengths, self.tokens.tokenizer.vocab_size)

    def run(self, codec: Codec, rank: int, world_size: int) -> None:
        """Write this rank's shards that are not there yet; whoever sees all shards finished writes the manifest."""
        job_hash = self._job_hash(codec)
        codec = codec.to(self.teacher.device)
        mine = self.shards[rank::world_size]
        finished = {shard.name for _, _, shard in mine if self._finished(shard, job_hash) is not None}
        if finished and rank == 0:
            print(f"continuing: {len(finished)} of rank 0's {len(mine)} shards are finished", flush=True)
        total = sum(shard.tokens for _, _, shard in mine if shard.name not in finished)
        with tqdm(total=total, unit="tok", unit_scale=True, desc="features", disable=rank != 0, mininterval=1) as bar:
            for split, index, shard in mine:
                if shard.name not in finished:
                    self._write(codec, job_hash, split, index, shard, bar)
        self._merge(codec, job_hash)

    def _write(self, codec: Codec, job_hash: str, split: str, index: int, shard: ShardInfo, bar: tqdm) -> None:
        for path in (self.output / shard.name, self._part(shard)):
            remove_unfinished(path.parent, path.name)
        rows = self._encoded_rows(codec, split, index, shard, bar)
        written = write_shard(self.output / shard.name, feature_members(codec, self.tokens.row_tokens), rows)
        info = FeatureShardInfo(name=shard.name, **written._asdict())
        write_text(self._part(shard), json.dumps({"job": job_hash, "shard": info.model_dump()}))

    def _encoded_rows(
        self, codec: Codec, split: str, index: int, shard: ShardInfo, bar: tqdm
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(features, scales) of the shard's rows; zeros behind the last window of a row."""
        reader = TokenRows(self.data, self.tokens, split)
        step = max(1, CHUNK_TOKENS // self.tokens.row_tokens)
        for start in range(0, shard.rows, step):
            tokens_BR, windows = reader.read(Span(0, index, start, min(start + step, shard.rows)))
            codes_BRC, scales_BR = encode_rows(self.teacher, codec, tokens_BR, windows)
            bar.update(int(sum(lengths.sum() for lengths in windows)))
            yield from zip(codes_BRC, scales_BR, strict=True)

    def _part(self, shard: ShardInfo) -> Path:
        return self.output / "parts" / f"{Path(shard.name).stem}.json"

    def _job_hash(self, codec: Codec) -> str:
        text = json.dumps(self.identity | {"codec": codec.fingerprint()}, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def _finished(self, shard: ShardInfo, job_hash: str, verify: bool = True) -> FeatureShardInfo | None:
        """The record of a finished shard, if there is one of this job and (`verify`) the file is what it says."""
        try:
            record = json.loads(self._part(shard).read_text())
            info = FeatureShardInfo.model_validate(record["shard"])
            path = self.output / info.name
            if record["job"] != job_hash or (info.name, info.rows) != (shard.name, shard.rows):
                return None
            if path.stat().st_size != info.bytes:
                return None
            if verify:
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != info.sha256:
                        return None
        except (OSError, ValueError, KeyError, TypeError, ValidationError):
            return None
        return info

    def _merge(self, codec: Codec, job_hash: str) -> None:
        """Write the manifest if every rank's shards are there. Several ranks may find so at once: they write the same
        bytes."""
        splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        for split, _, shard in self.shards:
            info = self._finished(shard, job_hash, verify=False)
            if info is None:
                return
            splits[split].append(info.model_dump())
        fidelity = json.loads((self.output / JOB_NAME).read_text())["fidelity"]
        numbers = ("mean_cosine", "p1_cosine", "explained", "bytes_per_token", "bf16_ratio")
        manifest = FeatureManifest.create(
            tokens_fingerprint=self.tokens.fingerprint,
            row_tokens=self.tokens.row_tokens,
            members=member_infos(codec, self.tokens.row_tokens),
            teacher=self.identity["teacher"],
            codec=codec.describe(),
            splits=splits,
            statistics={name: float(fidelity[name]) for name in numbers},
        )
        path = self.output / MANIFEST_NAME
        # Another rank that writes the same may take our temporary file for a killed run's: then its manifest is there.
        with contextlib.suppress(FileNotFoundError):
            write_text(path, manifest.model_dump_json(indent=2))
        remove_unfinished(self.output, MANIFEST_NAME)
        size = sum(shard["bytes"] for shards in splits.values() for shard in shards)
        print(f"finished: {self.output} ({format_bytes(size)} in {len(self.shards)} shards)", flush=True)


def encode_rows(
    teacher: Teacher, codec: Codec, tokens_BR: np.ndarray, windows: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Teacher and codec over packed rows -> codes uint8 [B, R, C] and scales uint8 [B, R], zeros behind the windows."""
    num_rows, row_tokens = tokens_BR.shape
    lengths, wanted = tile(windows, row_tokens)
    tokens_T = torch.from_numpy(tokens_BR.astype(np.int64).reshape(-1)).to(teacher.device)
    coded = codec.encode(teacher.features(tokens_T, lengths, wanted), tokens_T, lengths)
    real_T = torch.tensor(wanted).repeat_interleave(torch.tensor(lengths)).numpy()
    codes_TC = coded.codes_TC.cpu().numpy() * real_T[:, None]
    scales_T = coded.scales_T.cpu().numpy() * real_T
    return codes_TC.reshape(num_rows, row_tokens, -1), scales_T.reshape(num_rows, row_tokens)


def format_bytes(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def format_seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
