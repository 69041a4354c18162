"""The export of stage 1: the TextVAE alone, which a run of stage 2 takes as its `model.vae`, and transformers as an AutoModel."""

import dataclasses

import torch

from modeling.textvae import TextVAEModel, TextVAEModelConfig
from pretrain.checkpoint.read import check_shapes
from pretrain.export.parts import Exported, Source, modeling_files
from pretrain.stages.vae_config import VAERun

CARD = """---
library_name: transformers
license: {license_id}
tags:
- text-vae
---

# {name}

A TextVAE of {millions:,.1f}M parameters (stage 1 of TextLDM, arXiv 2605.07748): every token becomes a continuous latent of {latent_dim}
channels; all tokens are decoded in one parallel pass.

```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModel.from_pretrained("{name}", trust_remote_code=True)  # or the path of this folder
inputs = tokenizer(["Once upon a time"], add_special_tokens=False, padding=True, return_tensors="pt")
latents = model(**inputs).latents  # [rows, tokens, {latent_dim}]
print(tokenizer.batch_decode(model.decode(latents, inputs.attention_mask)))
```

A run of stage 2 takes this folder, or the hub's as `hf://owner/name`, as its `model.vae`.

Trained for {step:,} steps on data with fingerprint `{fingerprint}`.

<details><summary>Model and optimizer</summary>

```json
{settings}
```
</details>
"""


def export(source: Source) -> Exported:
    """A stage-vae run. Raises: UserError."""
    config = source.config
    assert isinstance(config, VAERun)
    source.without_flow("no flow")
    tensors = source.tensors()
    shape = config.model.architecture()
    shape.vocab_size = tensors.shapes["vae.embedding.weight"][0]
    model_config = TextVAEModelConfig(
        vae=dataclasses.asdict(shape),
        tokenizer_sha256=source.record.tokenizer_sha256,
        auto_map={"AutoConfig": "textvae.TextVAEModelConfig", "AutoModel": "textvae.TextVAEModel"},
    )
    with torch.device("meta"):
        model = TextVAEModel(model_config)
    found = {name: shape for name, shape in tensors.shapes.items() if name.startswith("vae.")}
    check_shapes(model, found, source.saved.checkpoint)
    card = source.card(CARD, model, latent_dim=shape.latent_dim)
    return Exported(model, tensors.__getitem__, card, modeling_files("textvae.py"))
