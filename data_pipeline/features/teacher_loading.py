"""A teacher from the Hugging Face hub or a local folder: loaded, cut behind the wanted hidden state, proven, and causal.

The whole model is loaded, but for its LM head: all but a few layers take part, and only the whole one says what is right. What
transformers may raise cannot be listed, so that each of its calls here turns any exception into one line with its cause.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from data_pipeline.core.errors import ENDINGS, UserError, reason
from data_pipeline.core.hub import find_model
from data_pipeline.core.pointers import pointer
from data_pipeline.features.codec import DTYPES
from data_pipeline.features.hidden_state import HiddenState, agree, find_hidden_state, probe_tokens, whole_state
from data_pipeline.features.teacher import Teacher

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "context_length")
"""What configurations call the longest sequence that a model was built for."""
_CAUSAL = "take a causal language model"
_PLACE = "give a hub id or a local Hugging Face folder"


def load_teacher(
    name_or_path: str | Path,
    layer: int = -3,
    revision: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    token_budget: int = 16384,
    whole: bool = False,
) -> Teacher:
    """Load a causal LM in evaluation mode, on the CPU.

    Args:
        name_or_path: hub id or local folder. Of a multimodal model the text model is taken.
        layer: index into transformers' `hidden_states`: of L layers there are L + 1, so -3 is what layer L - 2 puts out.
        whole: run all of the model for the state, to compare with what runs less of it.

    Raises:
        UserError: a model that cannot be read, that lacks weights, that is not causal, or that has no such layer.
    """
    name = str(name_or_path)
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    config = _read_config(name, revision)
    loaded, missing = _load(name, revision, config, dtype)
    model, prefix = _text_model(name, loaded, config, layer)
    with torch.inference_mode():
        with _one_line(f"teacher {name} cannot give hidden state {layer}", _CAUSAL):
            vocab_size = model.get_input_embeddings().weight.shape[0]
            state = find_hidden_state(model, layer, vocab_size, whole)
        _check_causal(state, name, vocab_size)
        feature_dim = state(probe_tokens(vocab_size, "width")).shape[-1]
    _check_complete(name, missing, prefix, [x for x in model.state_dict() if not x.startswith(state.unused)])
    return Teacher(
        state=state,
        name=name,
        revision=revision or getattr(config, "_commit_hash", None),
        feature_dim=feature_dim,
        vocab_size=vocab_size,
        max_positions=_positions(model.config),
        dtype=dtype,
        token_budget=token_budget,
    )


def _positions(config: PreTrainedConfig) -> int | None:
    """Tokens of the longest sequence that the model was built for, where its configuration says it."""
    named = (getattr(config, key, None) for key in _POSITIONS)
    return next((number for number in named if isinstance(number, int) and number > 0), None)


def _read_config(name: str, revision: str | None) -> PreTrainedConfig:
    """The model's configuration. Raises: UserError."""
    find_model(name, "no teacher at", "a hub id or a local Hugging Face folder")
    with _one_line(f"no teacher at {name}", _PLACE):
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"teacher {name} has an encoder and a decoder ({config.model_type}); {_CAUSAL}")
    return config


def _load(name: str, revision: str | None, config: PreTrainedConfig, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """The whole model without its head, and the names of the weights that the checkpoint does not have. Raises: UserError."""
    if Path(name).is_dir():
        for path in sorted(Path(name).glob("*.safetensors")) + sorted(Path(name).glob("*.bin")):
            if what := pointer(path):
                raise UserError(
                    f"teacher {name}: {path.name} is a {what} instead of the weights, which were not fetched"
                )
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    remedy = "check that the folder is complete and holds the model that its config.json describes"
    if method:
        remedy = f"its weights are quantised ({method}): install what that needs, or take the model before quantisation"
    with _quiet_transformers(), _one_line(f"cannot load teacher {name}", remedy):
        model, info = AutoModel.from_pretrained(
            name, revision=revision, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    return model.eval().requires_grad_(False), sorted(info["missing_keys"])


def _text_model(name: str, loaded: Any, config: PreTrainedConfig, layer: int) -> tuple[Any, str]:
    """The part that reads text, and what the names of its parameters begin with in the whole. Raises: UserError.

    The text model of a multimodal one, if it computes what the whole does of text alone.
    """
    if config.get_text_config() is config:
        return loaded, ""
    what = f"teacher {name} ({config.model_type}) is of text and more, and cannot be run on text alone"
    with torch.inference_mode(), _one_line(what, _CAUSAL):
        model = loaded.get_decoder()
        tokens_WL = probe_tokens(model.get_input_embeddings().weight.shape[0], "text alone")
        placeholders = [id_ for key, id_ in config.to_dict().items() if key.endswith(("_token_id", "_token_index"))]
        tokens_WL[torch.isin(tokens_WL, torch.tensor([id_ for id_ in placeholders if isinstance(id_, int)]))] = 0
        if not agree(whole_state(model, tokens_WL, layer), whole_state(loaded, tokens_WL, layer)):
            raise UserError(f"its {type(model).__name__} computes other states of text than all of it; {_CAUSAL}")
    return model, next(f"{path}." for path, module in loaded.named_modules() if module is model and path)


def _check_causal(state: HiddenState, name: str, vocab_size: int) -> None:
    """Tried rather than believed: changing the last token must leave the features before it alone."""
    tokens_WL = probe_tokens(vocab_size, "causal")
    tokens_WL[1] = tokens_WL[0]
    tokens_WL[1, -1] = (tokens_WL[1, -1] + 1) % vocab_size
    first, second = state(tokens_WL)[:, :-1]
    if not agree(second, first):
        raise UserError(
            f"teacher {name} is not causal: its features of a prefix depend on what follows, so neither truncation nor "
            "the feature cache would be exact; take a causal language model"
        )


def _check_complete(name: str, missing: list[str], prefix: str, used: list[str]) -> None:
    """Refuse weights that would be random; those of parts that take no part in the state may be."""
    lacking = sorted({prefix + parameter for parameter in used} & set(missing))
    if lacking:
        raise UserError(
            f"teacher {name} has no weights for {lacking[0]} (and {len(lacking) - 1} more): they would be random; "
            "check that the folder holds the model that its config.json describes"
        )


@contextlib.contextmanager
def _one_line(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever is raised into a UserError that begins with `what` and ends with the remedy, or with its own."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    except ENDINGS:
        raise
    except BaseException as error:
        raise UserError(f"{what}: {reason(error)}; {remedy}") from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No report about a head that is left out on purpose, no progress bar of a second."""
    verbosity = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()
