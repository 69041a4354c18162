"""How a teacher's features are stored: a few bytes a token, and back to [T, F] by one matrix product.

REPA's loss is a cosine, so only the direction u = y / |y| of a feature vector is kept:

    u  ~  mean + ngram_means(tokens) + (scale * digits) @ basis

`basis` holds principal components of what mean and n-gram tables leave, each with its spread; `scale` is the token's
own gain, one byte; a digit is one of L levels of a Gaussian Lloyd-Max quantiser. Components of large variance get
more levels, and as many digits share a byte as fit: 2 of 16 levels, 3 of 6, 4 of 4, 5 of 3, 8 of 2.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as safetensors_bytes

from data_pipeline.core.errors import UserError
from data_pipeline.core.outside import parse_json
from data_pipeline.core.storage import atomic_write, read_bytes
from data_pipeline.features.ngram_means import NgramMeans
from data_pipeline.features.quantise import code_bytes, codebook, dequantise, pack, scale_codes, scale_values
from data_pipeline.reading.batch import CodedFeatures

FORMAT = 1
LARGEST_BYTES = 1 << 34
"""Of a codec's file, n-gram tables above all."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class FeatureCodec:
    """Lossy codec of feature directions (see the module's text). C = bytes per token, K = components kept."""

    mean_F: torch.Tensor
    basis_KF: torch.Tensor
    """Orthonormal rows, by falling variance."""
    spread_K: torch.Tensor
    """Standard deviation of each component."""
    levels: tuple[int, ...]
    """Quantisation levels of each component, falling."""
    ngrams: NgramMeans

    def __post_init__(self) -> None:
        if len(self.levels) != len(self.basis_KF) or list(self.levels) != sorted(self.levels, reverse=True):
            raise UserError(
                f"a codec needs falling levels for its {len(self.basis_KF)} components, found {self.levels}"
            )

    @property
    def feature_dim(self) -> int:
        return len(self.mean_F)

    @property
    def groups(self) -> list[tuple[int, int]]:
        """(levels, number of components) of each run of components."""
        return [(levels, len(list(run))) for levels, run in groupby(self.levels)]

    @property
    def rank(self) -> int:
        return len(self.levels)

    @property
    def ngram_order(self) -> int:
        return self.ngrams.order

    @property
    def own_bytes(self) -> int:
        """Size of the codec itself, n-gram tables above all: paid once for a whole data set."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def num_code_bytes(self) -> int:
        """C, the bytes of one token's digits."""
        return sum(code_bytes(levels, count) for levels, count in self.groups)

    @property
    def bytes_per_token(self) -> float:
        """Digits and scale."""
        return self.num_code_bytes + 1

    def describe(self) -> dict:
        """What a manifest and a log say about the codec."""
        return {
            "kind": "pca",
            "rank": self.rank,
            "levels": {str(levels): count for levels, count in self.groups},
            "ngram_order": self.ngram_order,
            "ngram_entries": [len(keys) for keys in self.ngrams.keys],
            "feature_dim": self.feature_dim,
            "bytes_per_token": self.bytes_per_token,
            "fingerprint": self.fingerprint(),
        }

    def to(self, device: torch.device | str) -> "FeatureCodec":
        return FeatureCodec(
            self.mean_F.to(device),
            self.basis_KF.to(device),
            self.spread_K.to(device),
            self.levels,
            self.ngrams.to(device),
        )

    def encode(self, features_TF: torch.Tensor, tokens_T: torch.Tensor, window_lengths: Sequence[int]) -> CodedFeatures:
        """Features [T, F] of any dtype -> codes uint8 [T, C] and scales uint8 [T], on the codec's device."""
        check_features(features_TF, self.feature_dim)
        tokens_T = tokens_T.to(self.mean_F.device)
        directions_TF = torch.nn.functional.normalize(features_TF.to(self.mean_F), dim=1)
        residuals_TF = directions_TF - self.mean_F - self.ngrams.predict(tokens_T, window_lengths)
        whitened_TK = residuals_TF @ self.basis_KF.T / self.spread_K
        scales_T = scale_codes(whitened_TK.square().mean(dim=1).sqrt())
        whitened_TK = whitened_TK / scale_values(scales_T)[:, None]
        codes, first = [], 0
        for levels, count in self.groups:
            values_TK = whitened_TK[:, first : first + count].contiguous()
            thresholds = codebook(levels, self.rank).to(values_TK)
            thresholds = (thresholds[1:] + thresholds[:-1]) / 2
            codes.append(pack(torch.bucketize(values_TK, thresholds), levels))
            first += count
        return CodedFeatures(torch.cat(codes, dim=1), scales_T)

    def decode(self, coded: CodedFeatures, tokens_T: torch.Tensor, window_lengths: Sequence[int]) -> torch.Tensor:
        """Codes with the tokens and windows they were made for -> directions float32 [T, F] on the codec's device.

        Each is the mean of u over the features with these codes and tokens, as far as the model holds: its squared norm, below
        1, is its product with u on average.
        """
        device = self.mean_F.device
        codes_TC = coded.codes_TC.to(device)
        check_codes(codes_TC, self.num_code_bytes)
        values, first = [], 0
        for levels, count in self.groups:
            last = first + code_bytes(levels, count)
            values.append(dequantise(codes_TC[:, first:last], levels, count, rank=self.rank))
            first = last
        coefficients_TK = torch.cat(values, dim=1) * scale_values(coded.scales_T.to(device))[:, None]
        predicted_TF = self.mean_F + self.ngrams.predict(tokens_T.to(device), window_lengths)
        return predicted_TF + coefficients_TK @ (self.spread_K[:, None] * self.basis_KF)

    def tensors(self) -> dict[str, torch.Tensor]:
        named = {"mean": self.mean_F, "basis": self.basis_KF, "spread": self.spread_K}
        for n, (keys, means) in enumerate(zip(self.ngrams.keys, self.ngrams.means, strict=True), start=1):
            named |= {f"ngram_keys.{n}": keys, f"ngram_means.{n}": means}
        return named

    def metadata(self) -> dict:
        return {
            "format": FORMAT,
            "kind": "pca",
            "levels": list(self.levels),
            "vocab_size": self.ngrams.vocab_size,
            "ngram_order": self.ngram_order,
        }

    def fingerprint(self) -> str:
        """Hash over everything that decides what codes mean."""
        return _fingerprint(self.tensors(), self.metadata())

    def save(self, path: Path) -> None:
        """Write a safetensors file, atomically."""
        _save(path, self.tensors(), self.metadata())


@dataclass
class ExactCodec:
    """Stores the teacher's hidden states as they are, 2 or 4 bytes a value: the reference for any other codec."""

    feature_dim: int
    dtype: torch.dtype = torch.float32
    ngram_order: ClassVar[int] = 0
    own_bytes: ClassVar[int] = 0

    @property
    def rank(self) -> int:
        return self.feature_dim

    @property
    def num_code_bytes(self) -> int:
        return self.feature_dim * self.dtype.itemsize

    @property
    def bytes_per_token(self) -> float:
        return self.num_code_bytes + 1

    def describe(self) -> dict:
        """What a manifest and a log say about the codec."""
        return {
            "kind": "exact",
            "dtype": str(self.dtype).removeprefix("torch."),
            "feature_dim": self.feature_dim,
            "bytes_per_token": self.bytes_per_token,
            "fingerprint": self.fingerprint(),
        }

    def to(self, device: torch.device | str) -> "ExactCodec":
        return self

    def encode(self, features_TF: torch.Tensor, tokens_T: torch.Tensor, window_lengths: Sequence[int]) -> CodedFeatures:
        """Features [T, F] -> their bytes [T, C]; the scales are zeros and mean nothing."""
        check_features(features_TF, self.feature_dim)
        codes_TC = features_TF.to(self.dtype).contiguous().view(torch.uint8)
        return CodedFeatures(codes_TC, codes_TC.new_zeros(len(codes_TC)))

    def decode(self, coded: CodedFeatures, tokens_T: torch.Tensor, window_lengths: Sequence[int]) -> torch.Tensor:
        """Bytes -> features float32 [T, F], bit for bit."""
        check_codes(coded.codes_TC, self.num_code_bytes)
        # A copy: bytes out of a file need not lie where floats must.
        return coded.codes_TC.clone(memory_format=torch.contiguous_format).view(self.dtype).float()

    def metadata(self) -> dict:
        return {
            "format": FORMAT,
            "kind": "exact",
            "feature_dim": self.feature_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def fingerprint(self) -> str:
        """Hash over everything that decides what codes mean."""
        return _fingerprint({}, self.metadata())

    def save(self, path: Path) -> None:
        """Write a safetensors file, atomically."""
        _save(path, {"empty": torch.zeros(1)}, self.metadata())


Codec = FeatureCodec | ExactCodec


def load_codec(path: str | Path) -> Codec:
    """Read a codec that `save` wrote, from a path or URL, on the CPU.

    Raises UserError for a missing or broken file or another format.
    """
    folder, _, name = str(path).rpartition("/")
    try:
        data = read_bytes(folder or ".", name, LARGEST_BYTES)
        header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return _from_tensors(load_safetensors(data), parse_json(header["__metadata__"]["codec"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, OverflowError, MemoryError) as error:
        raise UserError(f"{path}: not a readable feature codec ({error}); cache the features again") from error


def _from_tensors(tensors: dict[str, torch.Tensor], meta: dict) -> Codec:
    if meta["format"] != FORMAT:
        raise ValueError(f"format {meta['format']}, expected {FORMAT}")
    if meta["kind"] == "exact":
        return ExactCodec(meta["feature_dim"], DTYPES[meta["dtype"]])
    orders = range(1, meta["ngram_order"] + 1)
    keys, means = ([tensors[f"{name}.{n}"] for n in orders] for name in ("ngram_keys", "ngram_means"))
    ngrams = NgramMeans(meta["vocab_size"], keys, means)
    return FeatureCodec(tensors["mean"], tensors["basis"], tensors["spread"], tuple(meta["levels"]), ngrams)


def check_features(features_TF: torch.Tensor, feature_dim: int) -> None:
    """Refuse features of another width, and non-finite ones, which would spoil every later step that reads them."""
    if features_TF.ndim != 2 or features_TF.shape[1] != feature_dim:
        raise UserError(f"features of shape {tuple(features_TF.shape)} for a codec of {feature_dim} features")
    if not bool(torch.isfinite(features_TF).all()):
        raise UserError("the teacher's features are not all finite; run it in float32 or bfloat16 (--dtype)")


def check_codes(codes_TC: torch.Tensor, num_code_bytes: int) -> None:
    """Refuse codes of another codec."""
    if codes_TC.dtype != torch.uint8 or codes_TC.ndim != 2 or codes_TC.shape[1] != num_code_bytes:
        raise UserError(
            f"codes of {codes_TC.dtype} {tuple(codes_TC.shape)}, the codec expects uint8 [T, {num_code_bytes}]; "
            "the features were cached with another codec"
        )


def _fingerprint(tensors: dict[str, torch.Tensor], metadata: dict) -> str:
    digest = hashlib.blake2b(json.dumps(metadata, sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    cpu_tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as file:
        file.write(safetensors_bytes(cpu_tensors, {"codec": json.dumps(metadata)}))
