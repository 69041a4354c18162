"""Does stage 1 see the same loss whichever way the teacher's features come?

The very stage of training (`VAEStage` in the quickstart's shape) on a part of the data that is cached twice, with the chosen codec
and exactly. A VAE is trained on the targets of each, and one on neither.

- `exact_minus_online`: the stage's whole loss on a held-out micro-batch, in training mode, with the exact cache minus with the online
  teacher: the largest absolute difference over micro-batches, of the untrained VAE and a trained one.
- `repa_loss_relative_difference`: REPA's loss on the held-out split with the chosen codec's targets against the exact ones, of the VAE
  trained on the former. (An untrained one's loss is near 0, so that a relative difference says nothing: the absolute one is
  `repa_loss_untrained_difference`.)
- `repa_loss_after_training_relative_difference`: of the VAE trained on the chosen codec's targets against the one trained on the exact
  ones, from the same weights on the same batches; both judged by exact targets.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.measuring import phase
from benchmarks.plain_run import PlainRun, vae_config
from data_pipeline.features.codec import Codec
from data_pipeline.features.codec_choice import FeatureSample, Fidelity, exact
from data_pipeline.features.job import FeatureJob
from data_pipeline.format.manifest import MANIFEST_NAME, Manifest
from data_pipeline.reading.loader import heldout_batches
from pretrain.stages.vae import VAEStage
from pretrain.stages.vae_config import VAERun

TRAIN_SHARDS = STREAMS = 2
HELDOUT_ROWS = 16
EXACT, CHOSEN, ONLINE = "exact", "chosen", "online"


@dataclass(frozen=True)
class Judged:
    """A VAE's losses on the held-out split: the whole loss of each micro-batch, and the mean REPA loss over all of them."""

    losses: list[float]
    repa_loss: float


def first_shards(data: Path, folder: Path) -> Manifest:
    """A prepared folder of the first train shards of `data` and its whole held-out split, by links."""
    manifest = Manifest.load(data)
    fields = manifest.model_dump(exclude={"fingerprint", "format_version"})
    fields["splits"]["train"] = fields["splits"]["train"][:TRAIN_SHARDS]
    part = Manifest.create(**fields)
    folder.mkdir(parents=True)
    for name in ("tokenizer", *(shard.name for shards in part.splits.values() for shard in shards)):
        (folder / name).symlink_to((data / name).resolve())
    (folder / MANIFEST_NAME).write_text(part.model_dump_json())
    return part


def judge(stage: VAEStage, config: VAERun) -> Judged:
    """Losses of the held-out split, in training mode: noise comes from the rows' keys, so it is the same for every stage."""
    batches = heldout_batches(
        config.data.path,
        config.features_folder(),
        split=config.data.split,
        seed=config.train.seed,
        micro_batch_rows=config.data.micro_batch_rows,
        max_rows=HELDOUT_ROWS,
    )
    losses, cosine = [], torch.zeros(2, dtype=torch.float64)
    device = next(stage.parameters()).device
    with torch.no_grad():
        for batch in batches:
            output = stage(batch.to(device), stage.token_counts(batch))
            losses.append(float(output.loss))
            cosine += output.metrics["repa_cosine"].double().cpu()
    return Judged(losses, float(-cosine[0] / cosine[1]))


def compare_losses(
    job: FeatureJob, codec: Codec, fidelity: Fidelity, held: FeatureSample, steps: int, work: Path, title: str
) -> dict[str, float]:
    """The figures of one teacher, as the file's head names them; `title` is its name in the progress."""
    tokens = first_shards(Path(job.data), work / "data")
    codecs = {CHOSEN: (codec, fidelity), EXACT: exact(held, job.teacher.dtype)}
    for name, (each, kept) in codecs.items():
        with phase(f"{title}: {name} features into a cache"):
            cached = replace(job, data=str(work / "data"), tokens=tokens, output=work / name)
            cached.keep(each, kept)
            cached.run(each, rank=0, world_size=1)
    configs = {
        name: vae_config(
            "quickstart_vae",
            {
                "data.path": work / "data",
                "data.streams": STREAMS,
                "data.micro_batch_rows": 4,
                "repa.features": None if name == ONLINE else work / name,
                "repa.online_teacher": job.teacher.name if name == ONLINE else None,
                "repa.layer": job.teacher.state.layer,
                "train.steps": steps,
                "schedule.warmup_steps": min(40, steps // 3),
                "kl.warmup_steps": 0,
            },
        )
        for name in (CHOSEN, EXACT, ONLINE)
    }
    stages: dict[str, VAEStage] = {}
    for name, config in configs.items():
        with phase(f"{title}: stage 1 with {name} features"), PlainRun(config, job.teacher.device) as run:
            stages[name] = run.stage
            if name == CHOSEN:
                untrained = {key: tensor.clone() for key, tensor in run.stage.state_dict().items()}
            for _ in tqdm(range(0 if name == ONLINE else steps), desc=f"stage 1, {name} features", dynamic_ncols=True):
                run.step()
    trained = {name: {key: t.clone() for key, t in stages[name].state_dict().items()} for name in (CHOSEN, EXACT)}

    def judged(weights: dict[str, torch.Tensor], name: str) -> Judged:
        stages[name].load_state_dict(weights)
        stages[name].step = steps
        return judge(stages[name], configs[name])

    with phase(f"{title}: losses on held-out rows"):
        before, after = ({name: judged(weights, name) for name in configs} for weights in (untrained, trained[CHOSEN]))
        on_exact = judged(trained[EXACT], EXACT).repa_loss
    pairs = [pair for each in (before, after) for pair in zip(each[EXACT].losses, each[ONLINE].losses, strict=True)]
    return {
        "exact_minus_online": max(abs(one - other) for one, other in pairs),
        "repa_loss_relative_difference": abs(after[CHOSEN].repa_loss / after[EXACT].repa_loss - 1),
        "repa_loss_untrained_difference": abs(before[CHOSEN].repa_loss - before[EXACT].repa_loss),
        "repa_loss_after_training_relative_difference": abs(after[EXACT].repa_loss / on_exact - 1),
        "repa_loss_chosen": after[CHOSEN].repa_loss,
        "repa_loss_exact": after[EXACT].repa_loss,
        "repa_loss_trained_on_exact": on_exact,
        "steps": steps,
    }
