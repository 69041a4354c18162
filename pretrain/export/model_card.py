"""README.md of an exported TextLDM: what the model is, how to use it, and what it was made from."""

import json
import re
from pathlib import Path
from typing import Any

from data_pipeline.core.telling import tellable
from modeling.textldm import TextLDM
from pretrain.export.parts import Source

CARD = """---
library_name: transformers
license: {license_id}
tags:
- text-generation
- latent-diffusion
- flow-matching
---

# {name}

A latent diffusion language model (TextLDM, arXiv 2605.07748). A TextVAE ({vae_millions:,.1f}M parameters) turns every token into
a continuous latent of {latent_dim} channels; a TextDiT ({dit_millions:,.1f}M) turns noise into the latents of a continuation,
given those of the prompt, by flow matching; the VAE's decoder reads all tokens off them in one parallel pass. The number
of network evaluations does not depend on the length.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)  # or the path of this folder
inputs = tokenizer(["Once upon a time"], add_special_tokens=False, padding=True, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens={new_tokens}, seed=0)
print(tokenizer.batch_decode(tokens, skip_special_tokens=True))
```

`pipeline("text-generation", "{name}", trust_remote_code=True)` works as well. `generate` also takes lists of token ids of any lengths, and
then returns a list of the new tokens alone; `num_steps` (default {num_steps}), `guidance_scale` ({guidance_scale:g}), `token_temperature`
({token_temperature:g}), `solver` ({solver}; there are euler, heun and multistep), `seed` (one for all, or one for each prompt), and more in
its docstring; defaults are in `generation_config.json`. Up to {max_window} tokens, prompt and continuation together, are drawn at once;
longer texts block by block. A continuation depends on its prompt, its seed and its length alone, not on what else is in the batch.

## Made from

| | |
|---|---|
| weights | {weights} of step {step:,}, checkpoint saved by {world_size} rank(s) in {precision} |
| data | {source} |
| data fingerprint | `{fingerprint}` |
| tokens in training shards | {tokens:,} |
| tokenizer | {tokenizer} ({vocab_size:,} ids) |
| purpose | {purpose} |

It continues text like its training data, with their errors and biases. It was not tuned to follow instructions, nor made safe for any use.

<details><summary>Training configuration</summary>

```json
{config}
```
</details>
"""


def model_card(model: TextLDM, source: Source) -> str:
    """The card's text, in Markdown with the hub's metadata on top."""
    config, shape, manifest, saved = source.record.config, model.config, source.manifest, source.saved
    return CARD.format(
        name=source.name,
        license_id=source.license_id,
        latent_dim=model.dit.config.latent_dim,
        dit_millions=_num_parameters(model.dit) / 1e6,
        vae_millions=_num_parameters(model.vae) / 1e6,
        new_tokens=min(128, shape.max_window // 2),
        num_steps=shape.num_steps,
        guidance_scale=shape.guidance_scale,
        token_temperature=shape.token_temperature,
        solver=shape.solver,
        max_window=shape.max_window,
        weights="moving average (EMA)" if source.weights == "ema" else "last weights",
        step=saved.step,
        world_size=saved.world_size,
        precision=cell(saved.precision),
        source=cell(_place(manifest.source)),
        fingerprint=manifest.fingerprint,
        tokens=sum(shard.tokens for shard in manifest.splits["train"]),
        tokenizer=cell(manifest.tokenizer.name),
        vocab_size=manifest.tokenizer.vocab_size,
        purpose=cell(config.get("about", {}).get("purpose") or "not stated"),
        config=tellable(json.dumps(_without_places(config), indent=1)),
    )


def cell(text: str) -> str:
    """A text from elsewhere as a cell of a Markdown table: one line, without passwords, in which no sign is Markdown or HTML."""
    return re.sub(r"[^\w\s.,:;/@#()+%=-]", lambda sign: f"&#{ord(sign[0])};", " ".join(tellable(text).split()))


def _num_parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _place(source: str) -> str:
    """A hub id or URL as it is, of a file or folder only its name."""
    return Path(source).name if Path(source).is_absolute() else source


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration's keys that determined the weights, of every folder only its last name."""
    told = {name: dict(config[name]) for name in ("model", "flow", "data", "optimizer", "schedule", "train")}
    for section, key in (("model", "vae"), ("data", "path"), ("train", "run")):
        told[section][key] = Path(told[section][key]).name
    told["data"].pop("cache_dir", None)
    return told
