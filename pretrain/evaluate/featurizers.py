"""Figures that need another model: MAUVE, BERTScore, the negative log-likelihood under a judge. Where that model cannot be had, the figure
is left out, and said.

Shape letters: N texts, F features.
"""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from tqdm import tqdm

from data_pipeline.core.errors import ENDINGS, UserError, reason
from data_pipeline.core.hub import find_model
from data_pipeline.core.keys import key
from pretrain.evaluate.bootstrap import Interval, mean, of_all, ratio_of_sums
from pretrain.evaluate.metrics import Judged
from pretrain.evaluate.records import split_ids
from pretrain.evaluate.samples import Sample
from pretrain.evaluate.subjects import Sampling, causal_subject

MAUVE_RESAMPLINGS = 30
LEAST_PER_BUCKET = 10
"""Texts for each bucket of MAUVE's histograms, as its authors have it."""
MAUVE_TOKENS = 1024
"""A text's first ones are featurised, as its authors do."""


def judge_nats(judged: Judged, judge: str, device: torch.device) -> dict[str, Interval]:
    """`generative_nll`: nats a token of what was written, given its prompt, under a causal language model. Raises: UserError.

    Low values alone say little: read them beside the entropy.
    """
    find_model(judge, "--judge", "a causal language model: a hub id or a folder")
    model = causal_subject(judge, Sampling(), device)
    nats, tokens = [], []
    for sample, record in zip(tqdm(judged.samples, "judge", disable=None, mininterval=2), judged.records):
        written = Sample(sample.key, sample.prompt, record.continuation)
        prompt, target = split_ids(model.texts, written)
        nats += model.nats([prompt], [target], [0])
        tokens.append(len(target))
    if not sum(tokens):
        raise UserError("nothing was written")
    return {"generative_nll": ratio_of_sums(nats, tokens)}


def bert_score(judged: Judged, model: str, layer: int | None, device: torch.device) -> tuple[dict[str, Interval], int]:
    """`bertscore`: F1 by the package bert-score, without idf or rescaling; and the layer. Raises: UserError.

    Args:
        layer: whose features are compared; the package's choice for models that it knows, else the last.
    """
    import bert_score as package
    from bert_score.utils import model2layers

    find_model(model, "--bertscore-model", "a hub id or a folder")
    if layer is None:
        layer = model2layers.get(model)
    try:
        if layer is None:
            config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
            layer = int(config.num_hidden_layers)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            *_, f1_N = package.score(
                judged.continuations(), judged.references(), model_type=model, num_layers=layer, device=str(device)
            )
    except ENDINGS:
        raise
    except BaseException as error:  # what the package, transformers and the hub raise cannot be listed
        raise UserError(f"--bertscore-model {model} cannot be had ({first_words(error)})") from None
    return {"bertscore": mean(f1_N.double().tolist())}, layer


def mauve(
    judged: Judged, model: str, buckets: int | None, seed: int, device: torch.device
) -> tuple[dict[str, Interval], int]:
    """`mauve` by the package mauve-text between what was written and the references, each without its prompt, 0 to 1; and its buckets.

    Features are the model's last hidden state at a text's last token, as the package's own. Raises: UserError.
    """
    import mauve as package

    count = len(judged.samples)
    buckets = buckets or max(2, count // LEAST_PER_BUCKET)
    if count < 2 * LEAST_PER_BUCKET or buckets * 2 > count:
        raise UserError(
            f"{count} texts are too few for {buckets} buckets; expected at least {LEAST_PER_BUCKET} a bucket: raise --samples"
        )
    ours_NF, true_NF = (features(texts, model, device) for texts in (judged.continuations(), judged.references()))

    def score(counts_N: np.ndarray) -> float:
        places = np.repeat(np.arange(count), counts_N)
        with warnings.catch_warnings(), _silent():
            warnings.simplefilter("ignore")
            found = package.compute_mauve(
                p_features=ours_NF[places],
                q_features=true_NF[places],
                num_buckets=buckets,
                seed=seed % 2**31,
                verbose=False,
            )
        return float(found.mauve)

    return {"mauve": of_all(score, count, MAUVE_RESAMPLINGS, key(seed, "mauve") % 2**31, within=(0, 1))}, buckets


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What faiss, a library in C++, says in every call of few points for its clusters."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def first_words(error: BaseException) -> str:
    """The first sentence of what another library says, at most 120 characters of it."""
    return reason(error).split(". ")[0][:120]


@torch.no_grad()
def features(texts: Sequence[str], name: str, device: torch.device) -> np.ndarray:
    """fp32 [N, F]. Raises: UserError."""
    find_model(name, "--mauve-model", "a hub id or a folder")
    try:
        loaded: Any = transformers.AutoModel.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except ENDINGS:
        raise
    except BaseException as error:
        raise UserError(f"--mauve-model {name} cannot be had ({first_words(error)})") from None
    model = loaded.eval().to(device)
    most = min(MAUVE_TOKENS, getattr(model.config, "max_position_embeddings", MAUVE_TOKENS) or MAUVE_TOKENS)
    found = []
    for text in tqdm(texts, "features for MAUVE", disable=None, mininterval=2):
        ids = tokenizer(text, verbose=False).input_ids[:most] or [tokenizer.eos_token_id or 0]
        states = model(input_ids=torch.tensor([ids], device=device)).last_hidden_state
        found.append(states[0, -1].float().cpu().numpy())
    return np.stack(found)
