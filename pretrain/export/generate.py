"""Continue prompts with an exported model.

    textldm generate --model export/textldm-xl --prompt "Once upon a time" --max-new-tokens 64

The noise of a prompt is keyed by the seed and its place in the list: what else is in the list does not matter.
"""

import codecs
import json
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers

from data_pipeline.core.devices import device_of
from data_pipeline.core.errors import ENDINGS, UserError, cli, reason
from data_pipeline.core.hub import find_model
from modeling.shapes import DEFAULT_NEW_TOKENS
from modeling.solvers import solver_names
from modeling.textldm import TextLDM, TextLDMConfig
from modeling.times import GRIDS
from pretrain.export.generate_line import EXPECTED, make_parser, read

__all__ = ["continue_prompts", "load_exported", "main", "make_parser"]

TRAJECTORY_TEXTS = 8


@dataclass(frozen=True)
class Continuation:
    """A prompt and what the model made of it; counts are tokens, before and without the end-of-text token."""

    prompt: str
    continuation: str
    num_prompt_tokens: int
    num_new_tokens: int


@dataclass(frozen=True)
class Options:
    """Of sampling; None takes the exported config's default."""

    max_new_tokens: int | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    solver: str | None = None
    grid: str | None = None
    token_temperature: float | None = None
    seed: int = 0


def load_exported(source: str | Path, device: str | torch.device = "cpu") -> tuple[TextLDM, Any]:
    """Model (in eval mode) and tokenizer of an exported folder or hub id, by this repository's code.

    Raises: UserError when it is not there, or is not a complete export.
    """
    folder = Path(source).expanduser()
    source = str(folder) if folder.is_dir() else str(source)
    find_model(source, "--model", EXPECTED)
    try:
        kind = TextLDMConfig.get_config_dict(source, trust_remote_code=False)[0].get("model_type")
        if kind != TextLDMConfig.model_type:
            found = f"holds a model of type {kind}" if kind else "has no config.json that names a model"
            raise UserError(
                f"--model {source} {found}; expected what textldm convert made of a run of stage dit or distill (any other model is"
                " loaded with transformers)"
            )
        loaded: Any = TextLDM.from_pretrained(source, output_loading_info=True, trust_remote_code=False)
        model, report = loaded
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, config=model.config, trust_remote_code=False)
    except (UserError, *ENDINGS):
        raise
    except BaseException as error:  # a tokenizer that makes its library panic raises no Exception
        raise UserError(
            f"--model {source} cannot be loaded ({reason(error)}); expected what textldm convert wrote"
        ) from None
    problems = {what: sorted(map(str, names))[:3] for what, names in report.items() if names}
    if problems:
        raise UserError(f"--model {source}: its weights do not fit its config.json: {problems}; export it again")
    return model.eval().to(device), tokenizer


def continue_prompts(
    model: TextLDM, tokenizer: Any, prompts: list[str], options: Options, trajectory: Path | None = None
) -> list[Continuation]:
    """Continuations of all prompts, drawn together.

    Args:
        trajectory: JSON file for the first prompt's text on its way from noise: a list of {"t", "text"}, t falling to 0; in a text beyond
            the window from 1 again in every block, behind those before it.

    Raises: UserError for requests beyond the model's vocabulary.
    """
    ids = [tokenizer(prompt, add_special_tokens=False, split_special_tokens=True).input_ids for prompt in prompts]
    request = asdict(options)
    left = model.config.max_window - max(map(len, ids), default=0)
    if options.max_new_tokens is None:
        request["max_new_tokens"] = min(DEFAULT_NEW_TOKENS, left) if left > 0 else DEFAULT_NEW_TOKENS
    num_steps = options.num_steps or model.defaults()["num_steps"]
    wanted = {round(i * (num_steps - 1) / (TRAJECTORY_TEXTS - 1)) for i in range(TRAJECTORY_TEXTS)}
    stages: list[dict[str, Any]] = []

    def keep(step: int, t: float, tokens: list[torch.Tensor]) -> None:
        if step in wanted:
            stages.append({"t": t, "text": tokenizer.decode(tokens[0])})

    try:
        tokens = model.generate(ids, on_step=keep if trajectory else None, **request)
    except ValueError as error:
        raise UserError(str(error)) from None
    texts = [tokenizer.decode(new) for new in tokens]
    if trajectory:
        stages.append({"t": 0.0, "text": texts[0]})
        try:
            trajectory.parent.mkdir(parents=True, exist_ok=True)
            trajectory.write_text(json.dumps(stages, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--trajectory {trajectory} cannot be written ({error.strerror})") from None
    return [Continuation(*row) for row in zip(prompts, texts, map(len, ids), map(len, tokens))]


def read_prompts(given: list[str], file: str | None) -> list[str]:
    """The prompts of the command line, then those of a file, one a line; without either, those that are piped in. Raises: UserError."""
    prompts = list(given)
    if file is None and not prompts and sys.stdin is not None and not sys.stdin.isatty():
        prompts = prompt_lines(_piped(), "the standard input")
    elif file == "-":
        prompts += prompt_lines(_piped(), "--prompt-file -")
    elif file is not None:
        try:
            prompts += prompt_lines(Path(file).read_bytes(), f"--prompt-file {file}")
        except OSError as error:
            raise UserError(f"--prompt-file {file} cannot be read: {error.strerror}") from None
    if not prompts:
        raise UserError(
            'nothing to continue; give --prompt TEXT (--prompt "" starts from nothing), --prompt-file FILE, or pipe prompts in'
        )
    return prompts


def prompt_lines(content: bytes, source: str) -> list[str]:
    """Prompts of UTF-8 bytes: a line is what a line feed ends, and only that; blank ones are left out. Raises: UserError."""
    prompts = []
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        try:
            text = line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{source}, line {number}: byte {error.start + 1} ({line[error.start]:#04x}) is not UTF-8; convert it, for example with"
                " iconv -t utf-8"
            ) from None
        if text.strip(" \t"):
            prompts.append(text)
    return prompts


def _piped() -> bytes:
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise UserError(f"the standard input cannot be read: {error}") from None


@cli
def main(argv: list[str] | None = None) -> None:
    """Continue prompts with an exported TextLDM."""
    given = read(argv)
    prompts = read_prompts(given.prompt, given.prompt_file)
    for name, found, known in (("solver", given.solver, solver_names()), ("grid", given.grid, GRIDS)):
        if found is not None and found not in known:
            raise UserError(f"--{name} {found}: expected one of {', '.join(known)}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer = load_exported(given.model, device_of(given.device))
    options = Options(**{field.name: getattr(given, field.name) for field in fields(Options)})
    for number, found in enumerate(continue_prompts(model, tokenizer, prompts, options, given.trajectory)):
        if given.json:
            print(json.dumps(asdict(found), ensure_ascii=False))
        else:
            rule = "" if number == 0 else "\n"
            print(f"{rule}[{found.num_prompt_tokens} tokens] {found.prompt}")
            print(f"[+{found.num_new_tokens} tokens] {found.continuation}")


if __name__ == "__main__":
    raise SystemExit(main())
