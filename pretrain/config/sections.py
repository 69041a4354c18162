"""Sections of a configuration that belong to the run as a whole, or to rooms above this one.

Every key has its type, default, unit and meaning; [paper] is stated by TextLDM (arXiv 2605.07748).
"""

from typing import Annotated, Self

from pydantic import AfterValidator, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from data_pipeline.core.settings import OnResume, Section, Share
from pretrain.engine.settings import Sharding

WATCHDOG_AHEAD_S = 60.0
"""By how much the watchdog must come before the collective operations' timeout: it looks every few seconds, and needs some to write."""


class About(Section):
    """What this configuration is for; nothing reads it but people."""

    purpose: str = ""
    """What the run makes, and why these values."""
    command: str = ""
    """The command that starts it."""
    hardware: str = ""
    """What it was sized for, and how long it takes there."""
    expected: str = ""
    """What a healthy run shows."""


class Train(Sharding):
    """The run itself: length, sharding, checkpoints, evaluation, faults."""

    run: Annotated[str, OnResume.FREE] = ""
    """Run folder; empty: runs/<name of the config>."""
    init_from: str = ""
    """Run folder or checkpoint of the same stage whose EMA weights a new run starts from, with a new optimizer at step 0; or an export's
    folder, or one of the hub as hf://owner/name; empty: none."""
    steps: PositiveInt  # by leave only, unless the schedule allows it (RunConfig.free_on_resume)
    """Optimizer steps in all."""
    seed: Annotated[NonNegativeInt, OnResume.NEVER] = 0
    """Key of everything random."""
    activation_checkpointing: Annotated[NonNegativeInt, OnResume.FREE] = 0
    """Recompute every n-th block in backward (1: all, about a third more work, least memory); 0: none."""
    compile: Annotated[bool, OnResume.FREE] = False
    """torch.compile the model's blocks."""
    deterministic: Annotated[bool, OnResume.FREE] = False
    """torch.use_deterministic_algorithms: bit-equal repeats on GPUs, slower."""
    checkpoint_every: Annotated[PositiveInt, OnResume.FREE] = 1000
    """Steps between checkpoints, written from a host copy while training goes on; the last step always has one."""
    keep_last: Annotated[PositiveInt, OnResume.FREE] = 2
    """Checkpoints to keep, besides the one that the job resumed from."""
    keep_every: Annotated[NonNegativeInt, OnResume.FREE] = 0
    """Also keep every checkpoint whose step is a multiple of this; 0: none."""
    eval_every: Annotated[NonNegativeInt, OnResume.FREE] = 1000
    """Steps between held-out evaluations, with EMA weights; 0: never."""
    eval_rows: Annotated[PositiveInt, OnResume.FREE] = 64
    """Held-out rows of an evaluation, over all ranks."""
    eval_samples: Annotated[NonNegativeInt, OnResume.FREE] = 2
    """Continuations of held-out contexts written at each evaluation, from the same noise every time, by stages that write any; 0: none."""
    log_every: Annotated[PositiveInt, OnResume.FREE] = 10
    """Steps between logged lines; between them nothing is reduced over ranks or written."""
    watchdog_s: Annotated[PositiveFloat, OnResume.FREE] = 1800.0
    """Seconds without a finished step after which all stacks are printed and the job ends (exit code 86)."""
    timeout_s: Annotated[PositiveFloat, OnResume.FREE] = 1860.0
    """Seconds after which a collective operation that some rank does not join fails; later than watchdog_s by 60 at least."""
    grace_s: Annotated[PositiveFloat, OnResume.FREE] = 120.0
    """Seconds from SIGTERM, SIGUSR1 or SIGHUP to the end of the checkpoint (then exit code 85)."""
    spike_sigmas: NonNegativeFloat = 0.0
    """Skip a step whose gradient norm exceeds the median of the last 128 by so many robust deviations; 0: if not finite only."""
    max_skips: Annotated[NonNegativeInt, OnResume.FREE] = 5
    """Skipped steps that are tolerated within skip_window; one more stops the run."""
    skip_window: Annotated[PositiveInt, OnResume.FREE] = 100
    """Steps over which skips are counted."""
    rewind: Annotated[bool, OnResume.FREE] = False
    """Instead of stopping at too many skips: go back to the previous checkpoint, once, and leave the bad rows out."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.grace_s >= self.watchdog_s:
            raise ValueError(
                f"train.grace_s is {self.grace_s:g} and train.watchdog_s {self.watchdog_s:g}; the watchdog would end the"
                " job during the checkpoint after a signal: make watchdog_s the larger"
            )
        if self.timeout_s < self.watchdog_s + WATCHDOG_AHEAD_S:
            raise ValueError(
                f"train.timeout_s is {self.timeout_s:g} and train.watchdog_s {self.watchdog_s:g}; NCCL would end the ranks that wait"
                " for a hung one before the watchdog has named it and written the stacks: set train.timeout_s to"
                f" {self.watchdog_s + WATCHDOG_AHEAD_S:g} or more, or train.watchdog_s lower"
            )
        return self


def _known_solver(name: str) -> str:
    """A solver's name. Raises: ValueError for one that nobody gave."""
    from modeling.solvers import find_solver  # with torch, which a configuration without this key need not wait for

    return find_solver(name).name


class Diagnose(Section):
    """What `textldm diagnose` measures, and the thresholds between go and no-go (docs/diagnosis.md)."""

    rows: PositiveInt = 32
    """Held-out rows that are measured."""
    sample_tokens: PositiveInt = 2048
    """Tokens of the held-out windows whose targets are generated, contexts included."""
    training_rows: PositiveInt = 4096
    """Training rows at most whose words and n-grams the generated text is compared with."""
    guidance_scale: NonNegativeFloat = 7.0
    """Of the generated text [paper: 7]."""
    token_temperature: PositiveFloat = 1.0
    """Of the generated text, with the categorical head: divides the tokens' logits, below 1 sharper [paper: no such head]."""
    num_steps: PositiveInt = 50
    """Solver steps of the generated text [paper: 50]."""
    solver: Annotated[str, AfterValidator(_known_solver)] = "euler"
    """Of the generated text: euler, heun, multistep, or an installed package's (docs/extending.md) [paper: euler]."""
    sweep_scales: tuple[NonNegativeFloat, ...] = (1.0, 2.0, 4.0, 7.0)
    """Guidance scales of the sweep, with second-order steps on a quarter of sample_tokens; none: no sweep."""
    min_token_accuracy: Share = 0.99
    """Held-out tokens that the VAE gives back; what it loses, no DiT can generate."""
    max_posterior_noise_share: Share = 0.8
    """Share of a sampled latent's variance that is noise, mean over channels. Near 1 the KL has swallowed the signal."""
    min_basin_radius: NonNegativeFloat = 0.25
    """Noise in standard deviations under which 90 % of tokens still decode: the error that the flow may leave."""
    min_repa_excess: float = 0.2
    """REPA cosine minus that of shuffled positions; arbitrary pairs alone reach about 0.66 in real models."""
    min_estimate_accuracy: Share = 0.9
    """Target tokens that the one-step estimate decodes at t = 0.05: the last steps of sampling must not do harm."""
    max_length_ratio: PositiveFloat = 1.5
    """Flow loss of the worst target length over the mean; a length that training never saw stands out."""
    max_latent_rms: PositiveFloat = 1.5
    """Root mean square of generated latents, 1 in the data; guidance that overshoots inflates them."""
    min_distinct_ratio: NonNegativeFloat = 0.5
    """distinct-2 of generated tokens over that of the true continuations, equally many."""
    min_entropy_ratio: NonNegativeFloat = 0.8
    """Token entropy of generated text over that of the true continuations; function-word soup is low."""
    min_real_word_share: Share = 0.8
    """Generated words that occur in the training text."""
    max_copied_excess: Share = 0.1
    """Generated 6-word sequences found in the training text, minus the share of those in true held-out continuations."""
    max_generalisation_gap: NonNegativeFloat = 0.1
    """Held-out flow loss over that of training rows, minus 1."""


class TelemetrySection(Section):
    """What is recorded besides metrics.jsonl."""

    wandb: bool = False
    """Send the logged lines to Weights & Biases: online when an API key is configured, else offline (upload later with `wandb sync`).
    WANDB_MODE=online, offline or disabled in the environment wins."""
    wandb_project: str = "textldm"
    """Project at Weights & Biases."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run folder (needs the tensorboard package)."""
    peak_tflops: PositiveFloat | None = None
    """Dense peak of one device at the run's precision, in TFLOP/s, for MFU; none: from a table of GPUs."""
