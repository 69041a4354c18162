"""TextLDM for inference: VAE, DiT and latent statistics in one Hugging Face model.

This file and its neighbours travel in every exported folder (`trust_remote_code=True`), so they import only torch,
transformers and each other.

Shape letters: N new tokens of all prompts, Z latent dim.
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import init_hf_modules

from .continuation import decode_targets, sample_targets
from .layers import statistics
from .likelihood import LAST_T0, target_nats
from .prompts import before, each, several, texts_of
from .solvers import Solver
from .text_dit import TextDiT, TextDiTConfig
from .text_vae import TextVAE, TextVAEConfig
from .times import TimeDistribution

SEEDS = 2**64


class TextLDMConfig(PretrainedConfig):
    """Shapes of both models and the defaults of `generate`.

    Attributes:
        vae, dit: fields of TextVAEConfig and TextDiTConfig.
        times: fields of TimeDistribution; the training distribution is the sampling schedule, and where it spreads the times of a
            window's tokens, so do `generate` and `nll`.
        num_steps, guidance_scale, solver, grid: defaults of `generate` (the paper: 50 Euler steps, scale 7, the training times).
        token_temperature: likewise; other than 1 with the categorical head alone (guidance.GuidedVelocity).
        likelihood_t0: default of `nll`, the time at which the diagnosis found the least bound.
        max_window: longest window, context and continuation together, in tokens.
    """

    model_type = "textldm"

    def __init__(
        self,
        vae: dict[str, Any] | None = None,
        dit: dict[str, Any] | None = None,
        times: dict[str, Any] | None = None,
        num_steps: int = 50,
        guidance_scale: float = 7.0,
        solver: str = "euler",
        grid: str = "training",
        token_temperature: float = 1.0,
        likelihood_t0: float = 0.6,
        max_window: int = 1024,
        **kwargs: Any,
    ):
        self.vae = vae or dataclasses.asdict(TextVAEConfig(vocab_size=256, latent_dim=8, width=64, head_dim=64))
        self.dit = dit or dataclasses.asdict(TextDiTConfig(latent_dim=8, width=64, head_dim=64))
        self.times = times or dataclasses.asdict(TimeDistribution())
        self.times["path"] = list(self.times.get("path", ()))  # as JSON gives it back
        self.num_steps, self.guidance_scale, self.solver, self.grid = num_steps, guidance_scale, solver, grid
        self.token_temperature, self.max_window = token_temperature, max_window
        self.likelihood_t0 = likelihood_t0
        super().__init__(**kwargs)


class TextLDM(PreTrainedModel, GenerationMixin):
    """Prompt in, continuation out: encode the prompt, flow from noise to latents given it, decode all tokens in one pass."""

    config_class = TextLDMConfig
    config: TextLDMConfig
    _no_split_modules = ["Block", "CategoricalHead"]  # noqa: RUF012 (the base class declares it so)

    def __init__(self, config: TextLDMConfig):
        super().__init__(config)
        self.vae = TextVAE(TextVAEConfig(**config.vae))
        self.dit = TextDiT(TextDiTConfig(**config.dit))
        # For from_pretrained, which converts tensor by tensor.
        self._keep_in_fp32_modules_strict = set(statistics(self))
        self.post_init()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As any module; but first the process that reads it finds this file, where it is one that transformers copied."""
        if not type(self).__module__.startswith("transformers_modules."):
            return super().__reduce_ex__(protocol)
        in_order = (_Later(init_hf_modules), _Later(object.__new__, type(self)))
        return operator.getitem, (in_order, 1), self.__dict__

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: the two models initialise themselves (`layers.initialize`)."""

    def forward(self, input_ids: Sequence[torch.Tensor], **options: Any) -> list[torch.Tensor]:
        """The same as `generate`: a diffusion language model has no other forward pass for a user."""
        return self.generate(input_ids, **options)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | Sequence[torch.Tensor | Sequence[int]],
        max_new_tokens: int | Sequence[int] = 128,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        solver: str | Solver | None = None,
        grid: str | None = None,
        token_temperature: float | None = None,
        seed: int | Sequence[int] = 0,
        noise: Sequence[torch.Tensor] | None = None,
        eos_token_id: int | None = None,
        on_step: Callable[[int, float, list[torch.Tensor]], None] | None = None,
    ) -> list[torch.Tensor]:
        """Continuations of prompts.

        Args:
            input_ids: token ids of each prompt, a list of 1-D tensors or lists (or a [batch, tokens] tensor without padding), or those
                of a single prompt; an empty prompt generates unconditionally.
            max_new_tokens: tokens that are drawn together, for all prompts or for each; the number of network evaluations does not depend
                on it.
            num_steps, guidance_scale, solver, grid, token_temperature: the config's when None; a solver by name or itself; grid is one
                of times.GRIDS.
            guidance_interval: times between which guidance is applied.
            seed: of the noise, 0 to 2^64 - 1; prompt i draws from (seed, i), whatever else is in the batch. Or a seed for each prompt,
                which then draws from its own alone, wherever it stands: the noise that it has by itself.
            noise: instead, one [max_new_tokens, Z] tensor a prompt.
            eos_token_id: cut each continuation before this token; the config's when None, no cut when there is none.
            on_step: called in every step with (step, t, tokens of each continuation as decoded from the one-step estimate).

        Returns: one 1-D int64 tensor of new tokens a prompt.
        Raises: ValueError for lengths beyond `config.max_window`, empty requests, ids or noise that do not fit.
        """
        config = self.config
        prompts = texts_of(input_ids)
        num_steps = config.num_steps if num_steps is None else num_steps
        lengths = each("max_new_tokens", max_new_tokens, len(prompts))
        self._check(prompts, lengths, num_steps, noise)
        keys = _keys(seed, len(prompts))
        if noise is None:
            noise = [self._noise(own, place, length) for (own, place), length in zip(keys, lengths)]
        offsets = None
        if spread := self._times.spread:
            offsets = [spread * self._noise(own, -1 - place, new)[:, 0] for (own, place), new in zip(keys, lengths)]

        def report(step: int, t: float, estimate_NZ: torch.Tensor) -> None:
            assert on_step is not None
            on_step(step, t, decode_targets(self.vae, estimate_NZ, lengths))

        latents_NZ = sample_targets(
            self.vae,
            self.dit,
            prompts,
            noise,
            self._times.grid(num_steps, grid or config.grid).tolist(),
            solver=solver or config.solver,
            guidance_scale=config.guidance_scale if guidance_scale is None else guidance_scale,
            guidance_interval=guidance_interval,
            token_temperature=config.token_temperature if token_temperature is None else token_temperature,
            on_step=report if on_step else None,
            offsets=offsets,
        )
        tokens = decode_targets(self.vae, latents_NZ, lengths)
        eos = eos_token_id if eos_token_id is not None else getattr(config, "eos_token_id", None)
        return [before(ids, eos) for ids in tokens]

    @torch.no_grad()
    def nll(
        self,
        input_ids: Sequence[torch.Tensor | Sequence[int]],
        target_ids: Sequence[torch.Tensor | Sequence[int]],
        t0: float | None = None,
        num_times: int = 24,
        seed: int | Sequence[int] = 0,
    ) -> torch.Tensor:
        """Upper bounds on -log p(target | prompt, its length), in nats a document: divide by its tokens for nats a token.

        Args:
            input_ids: token ids of each prompt, which may be empty; target_ids: of what follows it.
            t0: where the noise stops and the decoder begins; every one gives a bound (likelihood.py). The config's when None.
            num_times: of the integral, from t0 to 1.
            seed: of the noise; document i draws from (seed, i), whatever else is in the batch. Or a seed for each, as in `generate`.

        Returns: float64 [documents], on the CPU.
        Raises: ValueError for no documents, empty targets, and ids or lengths that do not fit.
        """
        t0 = self.config.likelihood_t0 if t0 is None else t0
        prompts, targets = texts_of(input_ids), texts_of(target_ids)
        if not prompts or len(prompts) != len(targets) or not all(map(len, targets)):
            raise ValueError(
                f"nll() needs as many targets as prompts, none of them empty, found {len(prompts)} prompts and targets of"
                f" {[len(ids) for ids in targets][:5]} tokens"
            )
        if not 0 < t0 <= LAST_T0 or num_times < 3:
            raise ValueError(
                f"t0 is {t0:g} and num_times {num_times}; expected a time in (0, {LAST_T0:g}] and at least 3"
            )
        for prompt, target in zip(prompts, targets):
            self._check_lengths(len(prompt), len(target))
        self._check_ids([*prompts, *targets])
        keyed = list(zip(_keys(seed, len(targets)), targets))
        noise = [
            torch.stack([self._noise(own, place * (num_times + 1) + k, len(target)) for k in range(num_times)])
            for (own, place), target in keyed
        ]
        offsets = None
        if spread := self._times.spread:
            drawn = [self._noise(own, (i + 1) * (num_times + 1) - 1, len(target)) for (own, i), target in keyed]
            offsets = [spread * noise_TZ[:, 0] for noise_TZ in drawn]
        return target_nats(self.vae, self.dit, prompts, targets, noise, t0, offsets).bounds_NG[:, 0]

    def _check(
        self,
        prompts: list[torch.Tensor],
        lengths: list[int],
        num_steps: int,
        noise: Sequence[torch.Tensor] | None,
    ) -> None:
        if not prompts or min(lengths) < 1:
            raise ValueError(
                f"generate() needs a prompt and max_new_tokens >= 1, found {len(prompts)} and {min(lengths, default=0)}"
            )
        for prompt, length in zip(prompts, lengths):
            self._check_lengths(len(prompt), length)
        self._check_ids(prompts)
        latent_dim = self.vae.config.latent_dim
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}; expected at least 1")
        shapes = [tuple(eps.shape) for eps in noise] if noise is not None else []
        expected = [(length, latent_dim) for length in lengths]
        if noise is not None and shapes != expected:
            raise ValueError(f"noise has shapes {shapes[:3]}; expected {expected[:3]}, one for each prompt")

    def _check_lengths(self, prompt: int, new: int) -> None:
        limit = self.config.max_window
        if prompt + new > limit:
            raise ValueError(
                f"a prompt of {prompt} tokens and {new} new ones are more than the {limit} of this model's windows;"
                " shorten the prompt, or ask for fewer new tokens"
            )

    def _check_ids(self, texts: Sequence[torch.Tensor]) -> None:
        places = sorted(set(map(str, getattr(self, "hf_device_map", {}).values())))
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                f"device_map put the model on {', '.join(places)}; expected devices that hold all of it, without parts that are fetched"
                " from memory or disk: encoder, decoder and head are read outside of the calls before which accelerate fetches them"
            )
        vocab_size = self.vae.config.vocab_size
        beyond = [id_ for ids in texts for id_ in ids.tolist() if not 0 <= id_ < vocab_size]
        if beyond:
            raise ValueError(
                f"token id {beyond[0]} is beyond the vocabulary of {vocab_size}; use this model's tokenizer"
            )

    @property
    def _times(self) -> TimeDistribution:
        return TimeDistribution(**self.config.times)

    def _noise(self, seed: int, index: int, new: int) -> torch.Tensor:
        if not 0 <= seed < SEEDS:
            raise ValueError(f"seed is {seed}; expected 0 to {SEEDS - 1}, that is 2^64 - 1")
        generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % SEEDS)
        return torch.randn(new, self.vae.config.latent_dim, generator=generator)


class _Later:
    """Pickled as a call that is made when it is read."""

    def __init__(self, function: Callable[..., Any], *args: Any):
        self._call = (function, args)

    def __reduce__(self) -> Any:
        return self._call


def _keys(seed: int | Sequence[int], num: int) -> list[tuple[int, int]]:
    """What the noise of each text is drawn from: a common seed and its place, or a seed of its own, which is as if it were alone."""
    seeds = each("seed", seed, num)
    return [(own, 0 if several(seed) else i) for i, own in enumerate(seeds)]
