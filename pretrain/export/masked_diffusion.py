"""The export of the baseline that denoises tokens: masked diffusion by TextLDM's conventions, with the code that it needs."""

import dataclasses

import torch

from modeling.shapes import DEFAULT_NEW_TOKENS
from modeling.textmdlm import TextMDLM, TextMDLMConfig
from pretrain.checkpoint.read import check_shapes
from pretrain.export.parts import Exported, Source, modeling_files
from pretrain.stages.token_config import MDLMRun

CARD = """---
library_name: transformers
license: {license_id}
tags:
- text-generation
- masked-diffusion
---

# {name}

Masked diffusion of tokens (MDLM, arXiv 2406.07524) of {millions:,.1f}M parameters, made beside TextLDM (arXiv 2605.07748) as what its
latent diffusion is measured by. All tokens of a continuation are masked at first; each of `num_steps` evaluations reveals an equal share,
in random order.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)  # or the path of this folder
inputs = tokenizer(["Once upon a time"], add_special_tokens=False, padding=True, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens={new_tokens}, num_steps={num_steps}, seed=0)
print(tokenizer.batch_decode(tokens, skip_special_tokens=True))
```

`AutoModelForMaskedLM` gives the same class, whose `forward` has logits of masked tokens (id `model.mask_token_id`, which is no token of the
tokenizer's, so that `pipeline("fill-mask")` cannot be used), and `model.nll(prompts, targets)` an upper bound on their nats. Up to
{max_window} tokens, prompt and continuation together, are drawn at once; longer texts block by block.

Trained for {step:,} steps on data with fingerprint `{fingerprint}`. It continues text like its training data, with their errors and biases.

<details><summary>Model and optimizer</summary>

```json
{settings}
```
</details>
"""


def export(source: Source) -> Exported:
    """A stage-mdlm run. Raises: UserError."""
    config, manifest = source.config, source.manifest
    assert isinstance(config, MDLMRun)
    source.without_flow("no flow and no VAE")
    tensors = source.tensors()
    shape = config.model.architecture()
    shape.vocab_size = tensors.shapes["model.lm_head.weight"][0]
    model_config = TextMDLMConfig(
        shape=dataclasses.asdict(shape),
        max_window=manifest.max_window,
        eos_token_id=manifest.tokenizer.eos_id,
        tokenizer_sha256=source.record.tokenizer_sha256,
        auto_map={
            "AutoConfig": "textmdlm.TextMDLMConfig",
            **dict.fromkeys(("AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM"), "textmdlm.TextMDLM"),
        },
    )
    with torch.device("meta"):
        model = TextMDLM(model_config)
    check_shapes(model, tensors.shapes, source.saved.checkpoint)
    assert model.generation_config is not None
    new_tokens = min(DEFAULT_NEW_TOKENS, max(1, manifest.max_window // 2))
    model.generation_config.update(max_new_tokens=new_tokens, pad_token_id=model_config.eos_token_id)
    card = source.card(
        CARD, model, new_tokens=new_tokens, num_steps=model_config.num_steps, max_window=manifest.max_window
    )
    return Exported(model, tensors.__getitem__, card, modeling_files("textmdlm.py"))
