"""The export of stage 2: frozen VAE, DiT and the latents' statistics as one `TextLDM`, with the code that it needs."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.core.errors import UserError
from data_pipeline.core.outside import parse_json
from modeling.likelihood import LAST_T0
from modeling.shapes import DEFAULT_NEW_TOKENS
from modeling.text_vae import STATISTICS
from modeling.textldm import TextLDM, TextLDMConfig
from modeling.times import TimeDistribution
from pretrain.checkpoint.read import check_shapes
from pretrain.export.model_card import model_card
from pretrain.export.parts import Exported, Source, modeling_files
from pretrain.stages.dit import times_of
from pretrain.stages.dit_config import DiTRun
from pretrain.stages.frozen_vae import SavedVAE, open_vae


def export(source: Source) -> Exported:
    """The inference model of a stage-2 run; the VAE is always the EMA one that stage 2 saw. Raises: UserError."""
    config = source.config
    assert isinstance(config, DiTRun)
    frozen = frozen_vae_of(source, config)
    shape = config.model.architecture()
    shape.vocab_size = frozen.shape.vocab_size
    times = times_of(config.flow)
    model_config = TextLDMConfig(
        vae=dataclasses.asdict(frozen.shape),
        dit=dataclasses.asdict(shape),
        max_window=source.manifest.max_window,
        eos_token_id=source.manifest.tokenizer.eos_id,
        auto_map={
            "AutoConfig": "textldm.TextLDMConfig",
            "AutoModel": "textldm.TextLDM",
            "AutoModelForCausalLM": "textldm.TextLDM",
        },
        **diagnosed(times, source.run),
        **source.sampling.settings(config.diagnose),
    )
    tensors = source.tensors()
    for name in STATISTICS:
        if name not in tensors:
            raise UserError(f"{source.saved.checkpoint} has no {name}: it is not a checkpoint of stage dit")
    with torch.device("meta"):
        model = TextLDM(model_config)
    shapes = {name: shape for name, shape in tensors.shapes.items() if name.startswith("dit.")}
    shapes |= {
        f"vae.{name}": tensors.shapes[name] if name in STATISTICS else shape for name, shape in frozen.shapes().items()
    }
    check_shapes(model, shapes, source.saved.checkpoint)

    def tensor(name: str) -> Tensor:
        """The VAE's own, but for the latents' statistics, which the DiT was trained with."""
        ours = name.removeprefix("vae.")
        return tensors[ours] if ours == name or ours in STATISTICS else frozen.read(ours)

    assert model.generation_config is not None
    new_tokens = min(DEFAULT_NEW_TOKENS, max(1, model_config.max_window // 2))
    model.generation_config.update(max_new_tokens=new_tokens, pad_token_id=model_config.eos_token_id)
    return Exported(model, tensor, model_card(model, source), modeling_files("textldm.py"))


def frozen_vae_of(source: Source, config: DiTRun) -> SavedVAE:
    """The VAE that the run was trained with. Raises: UserError if it is not there, or is another by now."""
    vae = source.vae or config.model.vae
    frozen = source.files.enter_context(open_vae(vae, source.manifest, named_by="--vae"))
    expected, found = source.record.inputs["model.vae"], frozen.fingerprint
    if found != expected:
        raise UserError(
            f"{source.run} was trained with a VAE of fingerprint {expected[:16]}, that in {vae} has {found[:16]} (has it been"
            " trained on?): name the right run, or its checkpoint's folder, with --vae"
        )
    return frozen


def diagnosed(times: TimeDistribution, run: Path) -> dict[str, Any]:
    """Fields of a `TextLDMConfig`: the times, with those of the even grid if the run's diagnosis has measured them, and its t0.

    Raises: UserError.
    """
    path = run / "diagnosis.json"
    if not path.is_file():
        return {"times": dataclasses.asdict(times)}
    try:
        found = parse_json(path.read_text())
        times = dataclasses.replace(times, path=tuple(found.get("even_times", ())))
        # A model that knows nothing has its least bound at t = 1, from where there is no integral.
        t0 = {"likelihood_t0": min(float(found["nats_t0"]), LAST_T0)} if "nats_t0" in found else {}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not what textldm diagnose writes ({error}): run it on {run} again") from None
    return {"times": dataclasses.asdict(times)} | t0
