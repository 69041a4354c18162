"""Export a stage-2 run as one Hugging Face folder that needs neither this repository nor DeepSpeed.

    textldm convert --run runs/dit_xl --output export/textldm-xl

    config.json                    shapes of both models, sampling defaults, auto_map of the code beside it
    model.safetensors              frozen VAE, DiT and the latents' statistics; EMA weights by default
    textldm.py, text_vae.py, ...   the modeling code, for `AutoModel.from_pretrained(folder, trust_remote_code=True)`
    tokenizer.json, ...            the tokenizer of the prepared data
    README.md                      model card

It is written beside the output's place and renamed, so that a folder is there as a whole or not at all.
"""

import argparse
import ast
import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import modeling
from data_pipeline.core.errors import UserError, cli
from data_pipeline.format.manifest import Manifest
from data_pipeline.text.tokenization import LoadedTokenizer, load_prepared_tokenizer
from modeling.solvers import solver_names
from modeling.text_dit import TextDiTConfig
from modeling.text_vae import TextVAE
from modeling.textldm import TextLDM, TextLDMConfig
from modeling.times import TimeDistribution
from pretrain.checkpoint.find import checkpoint_at, checkpoint_of
from pretrain.checkpoint.manifest import Manifest as CheckpointManifest
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.read import read_tensors
from pretrain.checkpoint.storage import Checkpoint
from pretrain.stages.dit import times_of
from pretrain.stages.dit import Flow
from pretrain.config.sections import Diagnose
from pretrain.stages.latent_space import load_vae, load_weights, vae_fingerprint
from pretrain.export.model_card import model_card

ENTRY = "textldm.py"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Defaults of `generate` in the exported config; None is what the run's diagnosis generates with."""

    num_steps: int | None = None
    guidance_scale: float | None = None
    belief_scale: float | None = None
    solver: str | None = None

    def __post_init__(self) -> None:
        if self.num_steps is not None and self.num_steps < 1:
            raise UserError(f"--num-steps is {self.num_steps}; expected at least 1")

    def settings(self, diagnose: Diagnose) -> dict[str, Any]:
        """Every field with its value."""
        given = dataclasses.asdict(self)
        return {name: getattr(diagnose, name) if value is None else value for name, value in given.items()}


@dataclasses.dataclass(frozen=True)
class Export:
    """What a folder is made of."""

    model: TextLDM
    manifest: Manifest
    tokenizer: LoadedTokenizer
    saved: CheckpointManifest
    weights: str


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
    overwrite: bool = False,
) -> Path:
    """Write the Hugging Face folder of a stage-2 run; returns it.

    Args:
        weights: "ema", or "weight" for the last weights themselves; the VAE is always the EMA one that stage 2 saw.
        step: which checkpoint; the newest complete one when None.
        data, vae: where the prepared data and the stage-1 run are now, when they moved since training.
        overwrite: put a folder aside that stands in the way and is not an export (an export is replaced).

    Raises: UserError.
    """
    check_output(output, overwrite)
    export = load_run(run, weights=weights, step=step, sampling=sampling or Sampling(), data=data, vae=vae)
    statistics = export.model.vae.latents_mean, export.model.vae.latents_std
    export.model.to(DTYPES[dtype])  # type: ignore[arg-type]
    # They stay fp32: rounded, they alone would shift every latent.
    export.model.vae.latents_mean, export.model.vae.latents_std = statistics

    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        export.model.save_pretrained(partial)
        for source in modeling_files():
            shutil.copyfile(source, partial / source.name)
        export.tokenizer.save(partial)
        card = model_card(export.model, export.manifest, export.saved, export.weights, output.name, license_id)
        (partial / "README.md").write_text(card, encoding="utf-8")
        make_room(output)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output


def with_even_times(times: TimeDistribution, run: Path) -> TimeDistribution:
    """With the times that the run's diagnosis measured for the even grid, if there is one. Raises: UserError."""
    path = run / "diagnosis.json"
    if not path.is_file():
        return times
    try:
        return dataclasses.replace(times, path=tuple(json.loads(path.read_text()).get("even_times", ())))
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not what textldm diagnose writes ({error}): run it on {run} again") from None


def load_run(
    run: Path, *, weights: str, step: int | None, sampling: Sampling, data: str | None = None, vae: str | None = None
) -> Export:
    """The inference model of a stage-2 run, on the CPU in fp32. Raises: UserError."""
    path = checkpoint_of(run) if step is None else checkpoint_at(run, step)
    saved = read_manifest(path)
    config = saved.extra["config"]
    if config["stage"] != "dit":
        raise UserError(f"{run} is a run of stage {config['stage']}; expected a run of stage dit, which names its VAE")
    data = data or config["data"]["path"]
    manifest = Manifest.load(data)
    if manifest.fingerprint != saved.extra["data_fingerprint"]:
        raise UserError(
            f"{run} was trained on data with fingerprint {saved.extra['data_fingerprint'][:16]}, {data} has"
            f" {manifest.fingerprint[:16]}: name the right folder with --data"
        )
    tokenizer = _tokenizer_of(data, manifest)
    vae = vae or config["model"]["vae"]
    frozen = load_vae(vae, manifest)
    expected, found = saved.extra["inputs"]["model.vae"], vae_fingerprint(vae)
    if found != expected:
        raise UserError(
            f"{run} was trained with a VAE of fingerprint {expected[:16]}, that in {vae} has {found[:16]} (has it been"
            " trained on?): name the right run, or its checkpoint's folder, with --vae"
        )
    names = {field.name for field in dataclasses.fields(TextDiTConfig)}
    shape = dataclasses.asdict(
        TextDiTConfig(**{name: value for name, value in config["model"].items() if name in names})
    )
    shape["vocab_size"] = frozen.config.vocab_size
    times = times_of(Flow.model_validate(config["flow"]), frozen.config.latent_dim)
    model_config = TextLDMConfig(
        vae=dataclasses.asdict(frozen.config),
        dit=shape,
        times=dataclasses.asdict(with_even_times(times, run)),
        max_window=manifest.max_window,
        eos_token_id=manifest.tokenizer.eos_id,
        auto_map={"AutoConfig": "textldm.TextLDMConfig", "AutoModel": "textldm.TextLDM"},
        # Not strict: the checkpoint's JSON has lists for tuples.
        **sampling.settings(Diagnose.model_validate(config["diagnose"], strict=False)),
    )
    tensors = read_tensors(path, weights)
    take_statistics(frozen, tensors, path)
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("dit.")}
    tensors |= {f"vae.{name}": tensor for name, tensor in frozen.state_dict().items()}
    with torch.device("meta"):
        model = TextLDM(model_config)
    model.to_empty(device="cpu")
    load_weights(model, tensors, path)
    return Export(model.eval().requires_grad_(False), manifest, tokenizer, saved, weights)


def take_statistics(vae: TextVAE, tensors: dict[str, Tensor], path: Checkpoint) -> None:
    """Set the VAE's `latents_mean` and `latents_std` to those of a DiT's checkpoint. Raises: UserError."""
    for name in ("latents_mean", "latents_std"):
        if name not in tensors:
            raise UserError(f"{path} has no {name}: it is not a checkpoint of stage dit")
        getattr(vae, name).copy_(tensors[name])


def modeling_files() -> list[Path]:
    """modeling/textldm.py and every neighbour that it needs, by its relative imports."""
    folder = Path(modeling.__path__[0])
    names, waiting = [], [ENTRY]
    while waiting:
        name = waiting.pop()
        if name in names:
            continue
        names.append(name)
        for node in ast.walk(ast.parse((folder / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                modules = [node.module] if node.module else [alias.name for alias in node.names]
                waiting += [f"{module}.py" for module in modules]
    return [folder / name for name in sorted(names)]


def check_output(output: Path, overwrite: bool) -> None:
    """Raise UserError when something else than an export stands at `output`, unless `overwrite`."""
    empty = output.is_dir() and not any(output.iterdir())
    if output.exists() and not (empty or is_export(output) or overwrite):
        raise UserError(f"{output} exists and is not an export; name another --output, or --overwrite to put it aside")


def make_room(output: Path) -> None:
    """Delete an earlier export; put anything else aside, as <output>.1 and so on."""
    if is_export(output):
        shutil.rmtree(output)
    elif output.exists():
        output.rename(next(p for n in itertools.count(1) if not (p := output.with_name(f"{output.name}.{n}")).exists()))


def is_export(folder: Path) -> bool:
    """Whether a folder is one that this command wrote."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == "textldm"
    except (OSError, ValueError, AttributeError):
        return False


def _tokenizer_of(data: str, manifest: Manifest) -> LoadedTokenizer:
    tokenizer = load_prepared_tokenizer(data)
    if tokenizer.info.sha256 != manifest.tokenizer.sha256:
        raise UserError(
            f"{data}/tokenizer is tokenizer {tokenizer.info.sha256[:16]}, the shards beside it were made with"
            f" {manifest.tokenizer.sha256[:16]} ({manifest.tokenizer.name}): put that one there"
        )
    return tokenizer


@cli
def main(argv: list[str] | None = None) -> None:
    """Export a stage-2 run as a Hugging Face folder."""
    parser = argparse.ArgumentParser(prog="textldm convert", description=main.__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder of stage 2, e.g. runs/dit_xl")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, e.g. export/textldm-xl")
    parser.add_argument(
        "--weights", choices=["ema", "weight"], default="ema", help="averaged (default) or last weights"
    )
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="instead of the newest complete one")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="of the stored weights")
    of_generate = "default of generate (the run's, in its diagnose section)"
    parser.add_argument("--num-steps", type=int, help=of_generate)
    parser.add_argument("--guidance-scale", type=float, help=of_generate)
    parser.add_argument("--belief-scale", type=float, help=of_generate)
    parser.add_argument("--solver", choices=solver_names(), help=of_generate)
    parser.add_argument("--data", help="the prepared data folder, if it moved since training")
    parser.add_argument("--vae", help="the stage-1 run's folder, or a checkpoint's, if it is elsewhere now")
    parser.add_argument("--license", default="apache-2.0", help="licence id for the model card")
    parser.add_argument("--overwrite", action="store_true", help="put a folder that stands in the way aside")
    given = parser.parse_args(argv)
    output = convert(
        given.run,
        given.output,
        weights=given.weights,
        step=given.checkpoint,
        dtype=given.dtype,
        sampling=Sampling(given.num_steps, given.guidance_scale, given.belief_scale, given.solver),
        data=given.data,
        vae=given.vae,
        license_id=given.license,
        overwrite=given.overwrite,
    )
    num_bytes = sum(path.stat().st_size for path in output.iterdir())
    print(f"{output}: {num_bytes / 1e6:,.1f} MB; try it:")
    print(f'textldm generate --model {output} --prompt "Once upon a time"')


if __name__ == "__main__":
    raise SystemExit(main())
