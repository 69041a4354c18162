"""Go or no-go: the checks that tell a healthy run from one whose loss only looks fine (docs/diagnosis.md).

    textldm diagnose --run runs/vae_base        is this latent space fit for diffusion?
    textldm diagnose --run runs/dit_xl          does it model language? (its VAE included)

Measures the EMA weights of the newest complete checkpoint on held-out rows, prints a table, and writes diagnosis.json and
diagnosis.png into the run folder. Thresholds and sizes: section `diagnose` of the run's configuration (--set diagnose.rows=64).
Exit code 0: go, 1: no-go, 2: it could not be measured.
"""

import argparse
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data_pipeline.core.devices import device_of
from data_pipeline.core.errors import UserError, cli
from data_pipeline.core.storage import atomic_write
from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.batch import Batch
from modeling.times import EstimatePath
from pretrain.checkpoint.find import checkpoint_of
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.read import read_tensors
from pretrain.checkpoint.storage import Checkpoint
from pretrain.config.load import load_config, micro_batch_size, parse_config
from pretrain.config.schema import RunConfig
from pretrain.diagnose import model_checks, text_checks
from pretrain.diagnose.page import draw
from pretrain.diagnose.verdicts import Verdict, judge, table
from pretrain.stages.build import build_stage
from pretrain.stages.dit import DiTRun, DiTStage
from pretrain.stages.latent_space import heldout_rows, load_weights, training_batches
from pretrain.stages.vae import VAERun, VAEStage

JSON_NAME, PAGE_NAME = "diagnosis.json", "diagnosis.png"
SHOWN_SAMPLES = 3
SWEEP_STEPS = 16

Figures = dict[str, Any]


def diagnose(config: RunConfig, run: Path, device: torch.device) -> tuple[Figures, list[Verdict]]:
    """Everything that is measured about a run, and the verdicts. Raises: UserError."""
    path = checkpoint_of(run)
    stage = load_stage(config, path, device)
    figures: Figures = {"run": str(run), "stage": config.stage, "step": read_manifest(path).step}
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        if isinstance(stage, VAEStage):
            figures |= vae_figures(stage, device, alone=True)
        else:
            vae_stage = stage_of_vae(stage, device)
            figures |= {"vae_run": stage.config.model.vae} | vae_figures(vae_stage, device, alone=False)
            figures |= flow_figures(stage, device)
            figures |= text_figures(stage, device)
    return figures, judge(figures, config)


def load_stage(config: RunConfig, path: Checkpoint, device: torch.device) -> VAEStage | DiTStage:
    """The stage with the EMA weights of a checkpoint, in eval mode, without DeepSpeed."""
    config.train.compile, config.train.activation_checkpointing = False, 0
    stage = build_stage(config, device)
    tensors = read_tensors(path, "ema")
    if isinstance(stage, VAEStage) and stage.repa is None:  # trained with a teacher that is not at hand now
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("repa.")}
    load_weights(stage, tensors, path)
    if isinstance(stage, DiTStage):
        # The statistics that the DiT was trained with are those of its checkpoint.
        stage.vae.latents_mean.copy_(stage.latents_mean)
        stage.vae.latents_std.copy_(stage.latents_std)
    return stage.eval().requires_grad_(False)


def stage_of_vae(stage: DiTStage, device: torch.device) -> VAEStage:
    """The stage-1 stage of a DiT's VAE, on its own data if that is still there, with its teacher's features if they are."""
    path = checkpoint_of(stage.config.model.vae)
    config = parse_config(read_manifest(path).extra["config"], str(path))
    assert isinstance(config, VAERun)  # load_vae has refused others
    config.diagnose = stage.config.diagnose
    try:
        Manifest.load(config.data.path)
    except UserError:
        config.data.path = stage.config.data.path
    try:
        vae_stage = load_stage(config, path, device)
    except UserError as error:
        say(f"  REPA is left out: {error}")
        config.repa.weight = 0.0
        vae_stage = load_stage(config, path, device)
    assert isinstance(vae_stage, VAEStage)
    vae_stage.vae.latents_mean.copy_(stage.latents_mean)
    vae_stage.vae.latents_std.copy_(stage.latents_std)
    return vae_stage


def heldout(config: RunConfig, device: torch.device) -> list[Batch]:
    """The run's first held-out rows, split as in training, with its features."""
    rows = config.diagnose.rows
    batches = heldout_rows(config, rows, micro_batch_rows=min(config.data.micro_batch_rows, rows))
    return [batch.to(device) for batch in batches]


def training(config: RunConfig, device: torch.device, rows: int) -> list[Batch]:
    """The first training rows, for comparison."""
    batch_rows = micro_batch_size(config, at_most=rows)
    batches = training_batches(config, rows, batch_rows)[: rows // batch_rows]
    return [batch.to(device) for batch in batches]


def vae_figures(stage: VAEStage, device: torch.device, alone: bool) -> Figures:
    """Checks 2 to 4 on the VAE; for a stage-1 run by itself also the floors of its latents and its training rows."""
    batches = heldout(stage.config, device)
    with phase("VAE: reconstruction and REPA", len(batches)) as tick:
        metrics = model_checks.heldout_metrics(stage, batches, tick)
    figures: Figures = {"vae_token_accuracy": metrics["token_accuracy"]}
    for name in ("ce", "kl_per_token", "repa_cosine", "repa_cosine_excess"):
        figures[name if name.startswith("repa") else f"vae_{name}"] = metrics.get(name)
    with phase("VAE: posterior and decoder", len(batches)) as tick:
        posterior = model_checks.Posterior.of(stage.vae, batches)
        if alone:
            posterior.standardise(stage.vae)
        accuracies = model_checks.decoder_basin(stage.vae, batches, tick)
    figures |= posterior.noise()
    figures |= {"noise_levels": list(model_checks.NOISE_LEVELS), "accuracy_at_noise": accuracies}
    figures["basin_radius"] = model_checks.basin_radius(accuracies)
    if alone:
        with phase("VAE: floors of its latents"):
            floors = posterior.floors()
        figures |= {f"{name}_floor": values for name, values in model_checks.by_quarter(floors).items()}
        figures["within_token_variance"] = floors.within_token_variance
        rows = training(stage.config, device, max(1, stage.config.diagnose.rows // 2))
        with phase("VAE: training rows", len(rows)) as tick:
            figures["training_token_accuracy"] = model_checks.heldout_metrics(stage, rows, tick)["token_accuracy"]
    return figures


def flow_figures(stage: DiTStage, device: torch.device) -> Figures:
    """Checks 1, 3, 5 and 6 on the DiT, and its loss on training rows (check 9)."""
    batches = heldout(stage.config, device)
    with phase("DiT: flow loss, true and foreign contexts", len(batches)) as tick:
        flow = model_checks.flow_figures(stage, batches, tick)
    if not flow.true:
        raise UserError(f"the first {stage.config.diagnose.rows} held-out rows of {stage.config.data.path} are empty")
    figures: Figures = {"flow_loss": flow.losses, "flow_loss_foreign_context": flow.foreign_losses}
    for name, values in flow.floors.items():
        figures |= {f"{name}_floor": values, f"{name}_floor_removed": flow.floors_removed[name]}
    figures["blind_floor_removed_mean"] = statistics.fmean(flow.floors_removed["blind"])
    figures["unigram_floor_removed_error"] = flow.floors_removed_error
    figures |= {"context_gap": flow.context_gap, "context_gap_error": flow.context_gap_error}
    figures["loss_by_target_length"] = flow.loss_by_length
    figures["within_token_variance"] = stage.floors.within_token_variance
    with phase("DiT: one-step estimates") as tick:
        figures["estimate_accuracy"] = model_checks.estimate_accuracy(stage, batches, tick)
    figures["estimate_times"] = list(model_checks.TIMES)
    rows = training(stage.config, device, max(1, stage.config.diagnose.rows // 2))
    with phase("DiT: training rows", len(rows)) as tick:
        figures["training_flow_loss"] = model_checks.heldout_metrics(stage, rows, tick)["flow"]
    figures["generalisation_gap"] = statistics.fmean(flow.losses) / figures["training_flow_loss"] - 1
    return figures


def text_figures(stage: DiTStage, device: torch.device) -> Figures:
    """Checks 7 to 9 on generated continuations of held-out contexts."""
    config, settings = stage.config, stage.config.diagnose
    manifest = Manifest.load(config.data.path)
    prompts = text_checks.prompts_of(heldout(config, device), settings.sample_tokens)
    if not prompts:
        say("  no held-out window has a context: generated text is not measured")
        return {}
    scale, num_steps = settings.guidance_scale, settings.num_steps
    path = EstimatePath()
    with phase(f"text: {num_steps} steps at guidance {scale:g}", num_steps) as tick:
        sample_TZ, generated = text_checks.sample(
            stage, prompts, scale, num_steps, settings.solver, tick=tick, path=path
        )
    truth = [prompt.target_T.tolist() for prompt in prompts]
    figures: Figures = {
        "guidance_scale": scale, "belief_scale": settings.belief_scale, "num_steps": num_steps, "solver": settings.solver,
        "generated_tokens": sum(map(len, generated)), "latent_rms": text_checks.rms(sample_TZ),
        "even_times": path.even_times(),
    }  # fmt: skip
    for name, texts in (("", generated), ("true_", truth)):
        for n in (1, 2):
            figures[f"{name}distinct_{n}"] = text_checks.distinct(texts, n)
        figures[f"{name}entropy"] = text_checks.entropy(texts)
    for name in ("distinct_2", "entropy"):
        figures[f"{name}_ratio"] = figures[name] / max(figures[f"true_{name}"], 1e-9)
    few = text_checks.prompts_of(heldout(config, device), settings.sample_tokens // 4)
    with phase("text: guidance sweep", SWEEP_STEPS * len(settings.sweep_scales)) as tick:
        figures["guidance_sweep"] = text_checks.guidance_sweep(stage, few, settings.sweep_scales, SWEEP_STEPS, tick)
    return figures | word_figures(stage.config, manifest, prompts, generated)


def word_figures(
    config: DiTRun, manifest: Manifest, prompts: Sequence[text_checks.Prompt], generated: Sequence[Sequence[int]]
) -> Figures:
    """What of the generated text occurs in the training text: words, and whole sequences of them."""
    try:
        reader = text_checks.Reader(config.data.path, manifest)
    except UserError as error:
        say(f"  words are not measured: {error}")
        return {}
    texts = reader.texts(generated)
    true_texts = reader.texts([prompt.target_T.tolist() for prompt in prompts])
    own, true = ([text_checks.words(text, whole=False) for text in group] for group in (texts, true_texts))
    wanted = {gram for words in (*own, *true) for gram in text_checks.ngrams(words, text_checks.COPY_WORDS)}
    rows = min(sum(shard.rows for shard in manifest.splits["train"]), config.diagnose.training_rows)
    with phase("text: words of the training rows", rows) as tick:
        training_text = text_checks.TrainingText.read(
            config.data.path, manifest, reader, wanted, rows, tick, **config.data.reading()
        )
    contexts = reader.texts([prompt.context_T.tolist() for prompt in prompts[:SHOWN_SAMPLES]])
    samples = [
        {"context": context, "generated": text, "true": true_text}
        for context, text, true_text in zip(contexts, texts, true_texts)
    ]
    figures: Figures = {"training_rows_read": training_text.rows, "training_words": len(training_text.words)}
    for name, group in (("", own), ("true_", true)):
        figures[f"{name}real_word_share"] = text_checks.real_word_share(group, training_text.words)
        figures[f"{name}copied_share"] = text_checks.copied_share(group, training_text.found)
    # A model that writes nothing but symbols writes no real words either.
    figures["real_word_share"] = figures["real_word_share"] or 0.0
    return figures | {"samples": samples}


@contextmanager
def phase(name: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """A bar in a terminal, and one line with its time in the end; yields what counts a step."""
    started = time.perf_counter()
    with tqdm(total=total, desc=f"  {name}", leave=False, disable=None) as bar:

        def tick(steps: int = 1) -> None:
            bar.update(steps)

        yield tick
    say(f"  {name}: {time.perf_counter() - started:.1f} s")


def say(text: str) -> None:
    """Progress goes to stderr, results to stdout."""
    print(text, file=sys.stderr, flush=True)


def finite(value: Any) -> Any:
    """The same with null for numbers that JSON lacks."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load_run(run: Path, overrides: Sequence[str]) -> RunConfig:
    """The configuration in a run folder. Raises: UserError."""
    if not (run / "config.json").is_file():
        raise UserError(f"{run} has no config.json; expected the folder of a training run, e.g. runs/vae_base")
    config = load_config(run / "config.json", overrides)
    config.train.run = str(run)  # it may have been moved
    return config


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="textldm diagnose", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a stage-1 or stage-2 run")
    parser.add_argument("--output", type=Path, help=f"folder for {JSON_NAME} and {PAGE_NAME} (the run folder)")
    parser.add_argument("--rows", type=int, help="held-out rows to measure (diagnose.rows)")
    parser.add_argument("--guidance-scale", type=float, help="of the generated text (diagnose.guidance_scale)")
    parser.add_argument("--num-steps", type=int, help="solver steps of the generated text (diagnose.num_steps)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the run")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    try:
        return run(argv)
    except Exception:  # Python would end with 1, which says no-go
        traceback.print_exc()
        return 2


@cli
def run(argv: list[str] | None = None) -> int:
    """Measure, judge, write and print."""
    arguments = make_parser().parse_args(argv)
    given = {name: getattr(arguments, name) for name in ("rows", "guidance_scale", "num_steps")}
    overrides = [f"diagnose.{name}={value}" for name, value in given.items() if value is not None]
    config = load_run(arguments.run, [*arguments.set, *overrides])
    device = device_of(arguments.device)
    output = arguments.output or arguments.run
    output.mkdir(parents=True, exist_ok=True)
    for name in (JSON_NAME, PAGE_NAME):  # an old verdict must not outlive a diagnosis that fails
        (output / name).unlink(missing_ok=True)
    started = time.perf_counter()
    figures, verdicts = diagnose(config, arguments.run, device)
    failed = [verdict for verdict in verdicts if verdict.passed is False]
    figures["seconds"] = round(time.perf_counter() - started, 1)
    figures["verdict"] = "no-go" if failed else "go"
    title = f"{arguments.run}: stage {config.stage}, step {figures['step']:,}"
    draw(figures, verdicts, title, output / PAGE_NAME)
    record = finite(figures | {"checks": [verdict.record() for verdict in verdicts]})
    with atomic_write(output / JSON_NAME) as file:
        file.write(json.dumps(record, indent=2, ensure_ascii=False).encode())
    print(f"\n{title}\n\n{table(verdicts)}\n")
    for sample in figures.get("samples", [])[:1]:
        print(f"one continuation:\n  ... {sample['context'][-160:]!r}\n  >>> {sample['generated'][:400]!r}\n")
    print(f"{output / JSON_NAME}, {output / PAGE_NAME}")
    judged = sum(verdict.passed is not None for verdict in verdicts)
    if failed:
        print(f"NO-GO: {len(failed)} of {judged} thresholds missed: {'; '.join(verdict.name for verdict in failed)}")
    else:
        print(f"GO: all {judged} thresholds met")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(None))
