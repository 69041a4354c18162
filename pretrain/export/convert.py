"""Export a run as one Hugging Face folder that needs neither this repository nor DeepSpeed.

    textldm convert --run runs/dit_xl --output export/textldm-xl

    config.json                    shapes of the models
    generation_config.json         defaults of `generate`
    model.safetensors              EMA weights by default; above --max-shard-size several files and their index
    textldm.py, text_vae.py, ...   the modeling code, for `AutoModel.from_pretrained(folder, trust_remote_code=True)`
    tokenizer.json, ...            the tokenizer of the prepared data
    README.md                      model card

It is written beside the output's place and renamed, so that a folder is there as a whole or not at all; tensor by tensor, of which one at
a time is in memory. What a stage's folder holds is
its exporter's matter (`StageKind.export`, parts.py).
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from data_pipeline.core.errors import UserError, cli, reason
from data_pipeline.core.hub import use_hub
from data_pipeline.core.outside import named
from data_pipeline.core.storage import atomic_folder, is_url
from data_pipeline.format.manifest import Manifest
from data_pipeline.text.tokenization import LoadedTokenizer, load_prepared_tokenizer
from modeling.solvers import solver_names
from modeling.textldm import TextLDMConfig
from pretrain.checkpoint.find import checkpoint_at, checkpoint_of
from pretrain.checkpoint.manifest import read_manifest, unaltered
from pretrain.checkpoint.storage import Checkpoint
from pretrain.config.registry import known_kinds, stage_kind
from pretrain.config.schema import RunConfig
from pretrain.export.parts import Exported, Sampling, Source
from pretrain.export.weights import LARGEST_FILE, write_weights
from pretrain.runs.folder import CONFIG_NAME, config_of
from pretrain.runs.record import RunRecord
from pretrain.stages.exported import CONFIG, STAGE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STATES = {"ema": "ema", "raw": "weight"}
"""The checkpoint's states by what they are called on the command line."""
FILES = "textldm_files"
"""Of the configs that this command writes: the SHA-256 of every file beside it, and of the rest of the config, as they were written."""


def convert(
    run: Path,
    output: Path,
    *,
    weights: str = "ema",
    step: int | None = None,
    dtype: str = "fp32",
    sampling: Sampling | None = None,
    data: str | None = None,
    vae: str | None = None,
    license_id: str = "apache-2.0",
    largest: str = LARGEST_FILE,
    overwrite: bool = False,
) -> Path:
    """Write the Hugging Face folder of a run; returns it.

    Args:
        weights: one of STATES: "ema", or "raw" for the last weights themselves.
        step: which checkpoint; the newest complete one when None.
        sampling: defaults of the exported model's `generate`, for stages that have them.
        data, vae: where the prepared data and the stage-1 run are now, when they moved since training.
        largest: bytes of a file of weights, see `write_weights`.
        overwrite: put aside what stands in the way and is not an unchanged export, which is replaced.

    Raises: UserError.
    """
    check_output(output, overwrite)
    named(re.compile(r"[\w.+-]+"), license_id, "--license", "name a licence by its id, e.g. apache-2.0")
    named(
        re.compile(r"[1-9]\d{0,5}[KMGT]B"), largest, "--max-shard-size", "give a size as transformers has it, e.g. 5GB"
    )
    state = STATES[weights]
    path = checkpoint_of(run, state=state) if step is None else unaltered(checkpoint_at(run, step), state).checkpoint
    saved = read_manifest(path)
    record = RunRecord.of_checkpoint(saved)
    kind = stage_kind(record.stage)
    if kind.export is None:
        able = [name for name, known in known_kinds().items() if known.export]
        raise UserError(
            f"{run} is a run of stage {record.stage}, which has no export; expected one of {', '.join(able)}"
        )
    config = present_config(run, path, record)
    if data is None and is_url(config.data.path):
        raise UserError(
            f"{run} was trained on {config.data.path}, and what a run names is not fetched: if you know that place, add"
            f" --data {config.data.path}"
        )
    data = data or config.data.path
    manifest = Manifest.load(data, "--data")
    if manifest.fingerprint != record.data_fingerprint:
        raise UserError(
            f"{run} was trained on data with fingerprint {record.data_fingerprint[:16]}, {data} has"
            f" {manifest.fingerprint[:16]}: name the right folder with --data"
        )
    tokenizer = load_prepared_tokenizer(data, manifest.tokenizer)
    with ExitStack() as files:
        source = Source(
            run,
            saved,
            record,
            config,
            manifest,
            tokenizer,
            state,
            output.name,
            license_id,
            files,
            sampling or Sampling(),
            vae,
        )
        exported: Exported = kind.load("export")(source)
        setattr(exported.model.config, STAGE, record.stage)
        # Statistics stay in fp32 (modeling.layers.KeepsStatistics).
        exported.model.to(DTYPES[dtype])  # type: ignore[arg-type]
        write(exported, tokenizer, output, largest)
    return output


def present_config(run: Path, checkpoint: Checkpoint, record: RunRecord) -> RunConfig:
    """The run's configuration as it is now, in its folder: where its data and VAE are, and how to sample, may have changed since the
    checkpoint, whose own configuration counts where it lies elsewhere. Raises: UserError.
    """
    folder = run if (run / CONFIG_NAME).is_file() else Path(str(checkpoint)).parent.parent
    if not (folder / CONFIG_NAME).is_file():
        return record.run_config(str(checkpoint))
    config = config_of(folder)
    if config.stage != record.stage:
        raise UserError(
            f"{folder / CONFIG_NAME} is of stage {config.stage}, the checkpoint {checkpoint} of stage {record.stage}: put the run's own"
            " configuration back"
        )
    return config


def write(exported: Exported, tokenizer: LoadedTokenizer, output: Path, largest: str = LARGEST_FILE) -> None:
    """Everything into a folder beside `output`, which then takes its place."""
    model = exported.model
    with atomic_folder(output) as folder:
        hashes = write_weights(model, exported.tensor, folder, largest)
        # As `save_pretrained` does it.
        model.config.dtype, model.config.architectures = str(model.dtype).split(".")[1], [type(model).__name__]
        if auto := getattr(model, "_auto_class", None):  # by `register_for_auto_class`
            place = f"{type(model).__module__.rpartition('.')[2]}.{type(model).__name__}"
            model.config.auto_map = {auto: place} | (getattr(model.config, "auto_map", None) or {})
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)  # type: ignore[union-attr]
        for file in exported.code:
            shutil.copyfile(file, folder / file.name)
        padding(tokenizer).save(folder)
        (folder / "README.md").write_text(exported.card, encoding="utf-8")
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        sealed = config | {FILES: _hashes(folder, config, hashes)}
        (folder / CONFIG).write_text(json.dumps(sealed, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        make_room(output)


def padding(tokenizer: LoadedTokenizer) -> LoadedTokenizer:
    """One that pads, as `tokenizer(texts, padding=True)` asks: by the end-of-text token and on the left, unless it says otherwise."""
    config, end = {"padding_side": "left"} | tokenizer.config, tokenizer.info.eos_id
    if not config.get("pad_token") and end is not None:
        config["pad_token"] = config.get("eos_token") or tokenizer.backend.id_to_token(end)
    return dataclasses.replace(tokenizer, config=config)


def check_output(output: Path, overwrite: bool) -> None:
    """Raise UserError when something else than an unchanged export stands at `output`, unless `overwrite`."""
    empty = output.is_dir() and not any(output.iterdir())
    if output.exists() and not (empty or is_export(output) or overwrite):
        raise UserError(
            f"{output} exists and is not an export, or holds more than it was written with or other weights: name another"
            " --output, or --overwrite to put it aside"
        )


def make_room(output: Path) -> None:
    """Delete an unchanged export; put anything else aside, as <output>.1 and so on."""
    if is_export(output):
        shutil.rmtree(output)
    elif output.exists():
        output.rename(next(p for n in itertools.count(1) if not (p := output.with_name(f"{output.name}.{n}")).exists()))


def is_export(folder: Path) -> bool:
    """Whether a folder is as this command wrote it, file by file: a clone has more in it, a tuned model other weights."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return config[FILES] == _hashes(folder, config)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _hashes(folder: Path, config: dict[str, Any], known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of all files, of which the `known` ones need not be read."""
    hashes = dict(known or {})
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        if (name := str(path.relative_to(folder))) not in hashes:
            with path.open("rb") as file:
                hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    rest = json.dumps({name: value for name, value in config.items() if name != FILES}, sort_keys=True)
    return hashes | {CONFIG: hashlib.sha256(rest.encode()).hexdigest()}


def push(folder: Path, repository: str) -> str:
    """Upload an export to the hub, where the token of `hf auth login` or HF_TOKEN may write; returns its address. Raises: UserError."""
    from huggingface_hub import HfApi

    use_hub()
    try:
        api = HfApi()
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="textldm convert")
    except Exception as error:  # of many kinds: no token, no right, no network
        raise UserError(f"--push {repository}: {reason(error)}; the export itself is whole, in {folder}") from None
    return str(address)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="textldm convert", description=main.__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder, e.g. runs/dit_xl")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, e.g. export/textldm-xl")
    parser.add_argument(
        "--weights", choices=sorted(STATES), default="ema", help="averaged (default) or the raw last weights"
    )
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="instead of the newest complete one")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="of the stored weights")
    of_generate = "default of generate (the run's, in its diagnose section)"
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", default=LARGEST_FILE, help="of a file of weights, e.g. 5GB (%(default)s)"
    )
    parser.add_argument("--num-steps", type=int, help=of_generate)
    parser.add_argument("--guidance-scale", type=float, help=of_generate)
    parser.add_argument("--token-temperature", type=float, help=of_generate)
    parser.add_argument("--solver", choices=solver_names(), help=of_generate)
    parser.add_argument("--data", help="the prepared data folder, if it moved since training")
    parser.add_argument("--vae", help="the stage-1 run's folder, or a checkpoint's, if it is elsewhere now")
    parser.add_argument("--license", default="apache-2.0", help="licence id for the model card")
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload it to the hub as well, as a private repository if it is new"
    )
    parser.add_argument("--overwrite", action="store_true", help="put a folder that stands in the way aside")
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    """Export a run as a Hugging Face folder."""
    given = make_parser().parse_args(argv)
    if given.push is not None:
        named(re.compile(r"[\w.-]+/[\w.-]+"), given.push, "--push", "name the repository with its owner")
    output = convert(
        given.run,
        given.output,
        weights=given.weights,
        step=given.checkpoint,
        dtype=given.dtype,
        sampling=Sampling(given.num_steps, given.guidance_scale, given.token_temperature, given.solver),
        data=given.data,
        vae=given.vae,
        license_id=given.license,
        largest=given.max_shard_size,
        overwrite=given.overwrite,
    )
    num_bytes = sum(path.stat().st_size for path in output.iterdir())
    export = json.loads((output / CONFIG).read_text(encoding="utf-8"))
    continues = export["model_type"] == TextLDMConfig.model_type
    print(f"{output}: {num_bytes / 1e6:,.1f} MB" + ("; try it:" if continues else ""))
    if continues:
        print(f'textldm generate --model {output} --prompt "Once upon a time"')
    if given.push is not None:
        print(push(output, given.push))


if __name__ == "__main__":
    raise SystemExit(main())
