"""TextLDM for inference: VAE, DiT and latent statistics in one Hugging Face model.

This file and its neighbours travel in every exported folder (`trust_remote_code=True`), so they import only torch,
transformers and each other.

Shape letters: N new tokens of all prompts, Z latent dim.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig

from .beyond_window import SEEDS, block_sizes, keyed_generator, latest, repeated, sequence_keys
from .continuation import draw_tokens
from .conventions import Generated, chosen, end_ids, right_padded, row_texts
from .likelihood import LAST_T0, target_nats
from .pretrained import ExportedModel
from .prompts import each, end_of, texts_of
from .solvers import Solver
from .text_dit import TextDiT, TextDiTConfig
from .text_vae import TextVAE, TextVAEConfig
from .times import TimeDistribution

OnTokens = Callable[[int, float, list[torch.Tensor]], None]
"""Called with (step, t, tokens of each continuation)."""
SAMPLING = ("num_steps", "guidance_scale", "solver", "grid")


class TextLDMConfig(PretrainedConfig):
    """Shapes of both models and the defaults of `generate`.

    Attributes:
        vae, dit: fields of TextVAEConfig and TextDiTConfig.
        times: fields of TimeDistribution; the training distribution is the sampling schedule, and where it spreads the times of a
            window's tokens, so do `generate` and `nll`.
        num_steps, guidance_scale, solver, grid: what `generation_config` begins with, the defaults of `generate` (the paper: 50 Euler
            steps, scale 7, the training times).
        token_temperature: likewise, as its `temperature`; other than 1 with the categorical head alone (guidance.GuidedVelocity).
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


class TextLDM(ExportedModel, GenerationMixin):
    """Prompt in, continuation out: encode the prompt, flow from noise to latents given it, decode all tokens in one pass."""

    config_class = TextLDMConfig
    config: TextLDMConfig
    vae: TextVAE
    dit: TextDiT

    def __init__(self, config: TextLDMConfig):
        vae, dit = TextVAE(TextVAEConfig(**config.vae)), TextDiT(TextDiTConfig(**config.dit))
        super().__init__(config, vae=vae, dit=dit)
        known = {name: getattr(config, name) for name in SAMPLING}
        marks = {name: getattr(config, name, None) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
        self.generation_config = GenerationConfig(
            do_sample=True, temperature=config.token_temperature, **known, **marks
        )

    def defaults(self) -> dict[str, Any]:
        """How `generate` samples where nobody says otherwise (`generation_config`, else the config), by the names of its arguments."""
        found = chosen({}, None, self.generation_config, self.config)
        temperature = self.config.token_temperature if found["temperature"] is None else found["temperature"]
        settings = {name: found[name] for name in (*SAMPLING, "guidance_interval")}
        return settings | {"token_temperature": temperature}

    def forward(self, input_ids: Any = None, **options: Any) -> Any:
        """The same as `generate`: a diffusion language model has no other forward pass for a user."""
        return self.generate(input_ids, **options)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | Sequence[torch.Tensor | Sequence[int]] | None = None,
        max_new_tokens: int | Sequence[int] | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        solver: str | Solver | None = None,
        grid: str | None = None,
        token_temperature: float | None = None,
        seed: int | Sequence[int] | None = None,
        noise: Sequence[torch.Tensor] | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        on_step: OnTokens | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        generator: torch.Generator | None = None,
        streamer: Any = None,
        **others: Any,
    ) -> Any:
        """Continuations of prompts.

        A continuation is a function of its prompt, its seed, its length and the settings alone, whatever else is in the call. One that
        fits into a window with its prompt is drawn at once; a longer one in blocks, each given the latest tokens before it.

        What is not named is as `generation_config` says, else the model's own (generation_config.json), else its config.

        Args:
            input_ids: token ids of each prompt: a list of 1-D tensors or lists, or those of a single prompt, a flat list. Or, as
                transformers does it, a [rows, tokens] tensor, padded left or right as its attention_mask says. None is one empty prompt;
                an empty prompt generates unconditionally.
            max_new_tokens: for all prompts or for each; 128 where nothing says it. Evaluations of the network are num_steps a block.
            num_steps, solver, grid: a solver by name or itself; grid is one of times.GRIDS.
            guidance_scale, guidance_interval: 1 is none; times between which it is applied, (0, 1) where nothing says it.
            token_temperature: below 1 sharper, with the categorical head; transformers' name `temperature` serves as well.
            seed: of the noise, 0 to 2^64 - 1, 0 where nothing says it; prompt i draws from (seed, i). Or a seed for each prompt, which
                then draws from its own alone, wherever it stands: the noise that it has by itself.
            noise: instead, one [max_new_tokens, Z] tensor a sequence.
            eos_token_id: ends a text, one or several; -1, which no token has, for none.
            on_step: called in every step with (step, t, tokens of each continuation as decoded from the one-step estimate).
            generator: from which a seed is drawn, instead of `seed`.
            streamer: as transformers' (`put`, `end`): given the prompt, then each block's tokens; for a single sequence.
            others: num_return_sequences n, as if each prompt stood there n times (with a seed of its own, in n places); max_length;
                return_dict_in_generate, for a `conventions.Generated`, and output_scores for its bounds; pad_token_id; and
                block_size: tokens that are drawn together, half a window for texts beyond it where nothing says it;
                best_of: draw so many and keep the one of the least bound in nats a token (24 evaluations each);
                patience: a block is done when its estimates have decoded to the same tokens in so many steps running.

        Returns: for a list of prompts one 1-D int64 tensor of new tokens each, up to the end of text, without it. For a tensor (and None) a
            [rows, tokens] tensor on its device: the prompt as it was given, the new tokens with the end of text, padded on the right.
        Raises: ValueError for empty requests, ids, masks, seeds or noise that do not fit, and settings that have no meaning here.
        """
        named = {
            "max_new_tokens": max_new_tokens, "num_steps": num_steps, "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval, "solver": solver, "grid": grid, "eos_token_id": eos_token_id, "seed": seed,
        } | others  # fmt: skip
        rows: Any = named.pop("inputs", None) if input_ids is None else input_ids
        rows = torch.zeros(1, 0, dtype=torch.int64) if rows is None else rows
        padded = isinstance(rows, torch.Tensor) and rows.dim() == 2
        prompts = row_texts(rows, attention_mask) if padded else texts_of(rows)
        settings = chosen(named, generation_config, self.generation_config, self.config)
        temperature = settings["temperature"] if token_temperature is None else token_temperature
        request = _Request(
            num_steps=settings["num_steps"],
            solver=settings["solver"],
            grid=settings["grid"],
            guidance_scale=settings["guidance_scale"],
            guidance_interval=tuple(settings["guidance_interval"]),
            token_temperature=self.config.token_temperature if temperature is None else temperature,
            ends=end_ids(settings["eos_token_id"]),
            block_size=settings["block_size"],
            patience=settings["patience"],
        )
        lengths = settings["max_new_tokens"]
        if lengths is None:
            lengths = [settings["max_length"] - (rows.shape[1] if padded else len(ids)) for ids in prompts]
        lengths = each("max_new_tokens", lengths, len(prompts))
        if generator is not None:
            seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
        else:
            seed = settings["seed"]
        num, best_of = settings["num_return_sequences"], settings["best_of"]
        if num < 1 or best_of < 1 or (best_of > 1 and noise is not None):
            raise ValueError(
                f"num_return_sequences is {num} and best_of {best_of}; expected at least 1, and best_of only without given noise"
            )
        self._check(prompts, lengths, request)
        keys = sequence_keys(seed, len(prompts), num * best_of)
        prompts, lengths = repeated(prompts, num * best_of), repeated(lengths, num * best_of)
        if noise is not None:
            self._check_noise(noise, lengths)
        path: list[tuple[float, list[torch.Tensor]]] | None = [] if settings["return_dict_in_generate"] else None

        def seen(step: int, t: float, tokens: list[torch.Tensor]) -> None:
            if path is not None:
                path.append((t, tokens))
            if on_step is not None:
                on_step(step, t, tokens)

        if streamer is not None:
            if len(prompts) > 1:
                raise ValueError(f"a streamer follows one sequence, found {len(prompts)}")
            streamer.put(rows.cpu() if padded else prompts[0][None])
        watched = seen if on_step is not None or path is not None else None
        texts = self._draw(prompts, lengths, keys, noise, request, watched, streamer)
        scores = None
        if settings["output_scores"] or best_of > 1:
            # Other noise than the text was made of, which would flatter it.
            scores = self._bounds(prompts, texts, [(SEEDS - 1 - own, place) for own, place in keys])
        if best_of > 1:
            assert scores is not None
            per_token = scores / torch.tensor([len(ids) for ids in texts])
            kept = per_token.view(-1, best_of).argmin(1) + torch.arange(0, len(texts), best_of)
            texts, scores = [texts[i] for i in kept], scores[kept]
            path = path and [(t, [tokens[i] for i in kept]) for t, tokens in path]
        if streamer is not None:
            streamer.end()
        pad = settings["pad_token_id"]
        pad = pad if pad is not None else (request.ends[0] if request.ends and request.ends[0] >= 0 else 0)
        sequences: Any = [ids[: end_of(ids, request.ends)] for ids in texts]
        if padded:
            sequences = torch.cat((rows.cpu().repeat_interleave(num, 0), right_padded(texts, pad)), 1).to(rows.device)
        if path is None:
            return sequences
        steps = tuple(right_padded(tokens, pad) for _, tokens in path)
        asked = bool(settings["output_scores"])
        return Generated(sequences, scores if asked else None, steps, torch.tensor([t for t, _ in path]))

    def _draw(
        self,
        prompts: Sequence[torch.Tensor],
        lengths: Sequence[int],
        keys: Sequence[tuple[int, int]],
        noise: Sequence[torch.Tensor] | None,
        request: "_Request",
        on_step: OnTokens | None,
        streamer: Any = None,
    ) -> list[torch.Tensor]:
        """The new tokens of each prompt with the one that ends them, where there is one: a block of each at a time, packed."""
        window = self.config.max_window
        sizes = [block_sizes(len(ids), new, window, request.block_size) for ids, new in zip(prompts, lengths)]
        found = [ids.new_zeros(0) for ids in prompts]
        going = list(range(len(prompts)))
        for block in range(max(map(len, sizes))):
            going = [i for i in going if block < len(sizes[i]) and end_of(found[i], request.ends) is None]
            if not going:
                break

            def seen(step: int, t: float, tokens: list[torch.Tensor], going: list[int] = going) -> None:
                assert on_step is not None
                now = dict(zip(going, tokens))
                on_step(step, t, [torch.cat((ids, now[i])) if i in now else ids for i, ids in enumerate(found)])

            own_noise: list[torch.Tensor] = []
            offsets: list[torch.Tensor] | None = [] if self._times.spread else None
            for i in going:
                (own, place), size, done = keys[i], sizes[i][block], len(found[i])
                own_noise.append(
                    self.keyed_noise(own, place, size, block) if noise is None else noise[i][done : done + size]
                )
                if offsets is not None:
                    offsets.append(self._times.spread * self.keyed_noise(own, -1 - place, size, block)[:, 0])
            drawn = draw_tokens(
                self.vae,
                self.dit,
                [latest(torch.cat((prompts[i], found[i])), sizes[i][block], window) for i in going],
                own_noise,
                self._times.grid(request.num_steps, request.grid).tolist(),
                patience=request.patience,
                on_step=seen if on_step is not None else None,
                solver=request.solver,
                guidance_scale=request.guidance_scale,
                guidance_interval=request.guidance_interval,
                token_temperature=request.token_temperature,
                offsets=offsets,
            )
            for i, ids in zip(going, drawn):
                end = end_of(ids, request.ends)
                new = ids if end is None else ids[: end + 1]
                found[i] = torch.cat((found[i], new))
                if streamer is not None:
                    streamer.put(new)
        return found

    @torch.no_grad()
    def nll(
        self,
        input_ids: Sequence[torch.Tensor | Sequence[int]],
        target_ids: Sequence[torch.Tensor | Sequence[int]],
        t0: float | None = None,
        num_times: int = 24,
        seed: int | Sequence[int] = 0,
        block_size: int | None = None,
    ) -> torch.Tensor:
        """Upper bounds on -log p(target | prompt, its length), in nats a document: divide by its tokens for nats a token.

        A target that does not fit into a window with its prompt is measured in blocks, each given the latest true tokens before it: the
        sum of their bounds is one of the whole.

        Args:
            input_ids: token ids of each prompt, which may be empty; target_ids: of what follows it.
            t0: where the noise stops and the decoder begins; every one gives a bound (likelihood.py). The config's when None.
            num_times: of the integral, from t0 to 1.
            seed: of the noise; document i draws from (seed, i), whatever else is in the batch. Or a seed for each, as in `generate`.
            block_size: tokens that are measured together, half a window for documents beyond it when None.

        Returns: float64 [documents], on the CPU.
        Raises: ValueError for no documents, empty targets, and ids that do not fit.
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
        self._check_block(block_size)
        self._check_ids([*prompts, *targets])
        return self._bounds(prompts, targets, sequence_keys(seed, len(targets)), t0, num_times, block_size)

    def _bounds(
        self,
        prompts: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor],
        keys: Sequence[tuple[int, int]],
        t0: float | None = None,
        num_times: int = 24,
        block_size: int | None = None,
    ) -> torch.Tensor:
        """A block of each document at a time, packed, as they are drawn."""
        window, spread = self.config.max_window, self._times.spread
        t0 = self.config.likelihood_t0 if t0 is None else t0
        sizes = [block_sizes(len(ids), len(x), window, block_size) for ids, x in zip(prompts, targets)]
        bounds_N = torch.zeros(len(targets), dtype=torch.float64)
        for block in range(max(map(len, sizes))):
            going = [i for i in range(len(targets)) if block < len(sizes[i])]
            contexts, pieces, noise, draws = [], [], [], []
            for i in going:
                (own, place), size, done = keys[i], sizes[i][block], sum(sizes[i][:block])
                contexts.append(latest(torch.cat((prompts[i], targets[i][:done])), size, window))
                pieces.append(targets[i][done : done + size])
                first = place * (num_times + 1)
                noise.append(torch.stack([self.keyed_noise(own, first + k, size, block) for k in range(num_times)]))
                draws.append(self.keyed_noise(own, first + num_times, size, block)[:, :2])
            found = target_nats(self.vae, self.dit, contexts, pieces, noise, t0, spread, draws)
            bounds_N[going] += found.bounds_NG[:, 0]
        return bounds_N

    def _check(self, prompts: Sequence[torch.Tensor], lengths: Sequence[int], request: "_Request") -> None:
        if not prompts or min(lengths) < 1:
            raise ValueError(
                f"generate() needs a prompt and max_new_tokens >= 1, found {len(prompts)} and {min(lengths, default=0)}"
            )
        self._check_ids(prompts)
        self._check_block(request.block_size)
        if request.num_steps < 1:
            raise ValueError(f"num_steps is {request.num_steps}; expected at least 1")
        if request.patience is not None and request.patience < 2:
            raise ValueError(f"patience is {request.patience}; expected at least 2 steps, or None")

    def _check_noise(self, noise: Sequence[torch.Tensor], lengths: Sequence[int]) -> None:
        shapes = [tuple(eps.shape) for eps in noise]
        expected = [(length, self.vae.config.latent_dim) for length in lengths]
        if shapes != expected:
            raise ValueError(f"noise has shapes {shapes[:3]}; expected {expected[:3]}, one for each sequence")

    def _check_block(self, block_size: int | None) -> None:
        if block_size is not None and not 1 <= block_size <= self.config.max_window:
            raise ValueError(
                f"block_size is {block_size}; expected 1 to the {self.config.max_window} tokens of this model's windows"
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

    def keyed_noise(self, seed: int, index: int, new: int, block: int = 0) -> torch.Tensor:
        """The noise [new, Z] of a block's tokens: that of prompt `index` with `seed` for 0 and more, of its offsets for -1 - index.

        Raises: ValueError.
        """
        return torch.randn(new, self.vae.config.latent_dim, generator=keyed_generator(seed, index, block))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Request:
    """How texts are drawn: the settings of `generate`, none of them open."""

    num_steps: int
    solver: str | Solver
    grid: str
    guidance_scale: float
    guidance_interval: tuple[float, float]
    token_temperature: float
    ends: tuple[int, ...]
    block_size: int | None
    patience: int | None
