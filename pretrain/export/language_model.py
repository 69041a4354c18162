"""The export of the causal baseline: a stock class of transformers, which needs none of our code."""

import torch
from transformers import GPTNeoXForCausalLM

from modeling.stock_language_model import stock_config, stock_weight
from modeling.token_transformer import TokenTransformer
from pretrain.checkpoint.read import check_shapes
from pretrain.export.parts import Exported, Source
from pretrain.stages.token_config import ARRun

CARD = """---
library_name: transformers
license: {license_id}
tags:
- text-generation
---

# {name}

A causal language model of {millions:,.1f}M parameters, made beside TextLDM (arXiv 2605.07748) as what its latent diffusion is measured
by. Every text begins with the end-of-text token:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")  # or the path of this folder
ids = tokenizer(tokenizer.eos_token + "Once upon a time", return_tensors="pt", add_special_tokens=False).input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=64, do_sample=True)[0]))
```

Trained for {step:,} steps on data with fingerprint `{fingerprint}`, at most {max_window} tokens a text. It continues text like its
training data, with their errors and biases.

<details><summary>Model and optimizer</summary>

```json
{settings}
```
</details>
"""


def export(source: Source) -> Exported:
    """A stage-ar run as GPT-NeoX. Raises: UserError."""
    config = source.config
    assert isinstance(config, ARRun)
    source.without_flow("no flow and no VAE")
    manifest, checkpoint = source.manifest, source.saved.checkpoint
    tensors = source.tensors()
    shape = config.model.architecture()
    shape.vocab_size = tensors.shapes["model.lm_head.weight"][0]
    start_id = manifest.tokenizer.eos_id
    assert start_id is not None  # without one it could not have been trained
    with torch.device("meta"):
        found = {name.removeprefix("model."): shape for name, shape in tensors.shapes.items()}
        check_shapes(TokenTransformer(shape), found, checkpoint)
        model = GPTNeoXForCausalLM(stock_config(shape, start_id, manifest.max_window))
    card = source.card(CARD, model, max_window=manifest.max_window)
    return Exported(model, lambda name: stock_weight(name, shape, lambda ours: tensors[f"model.{ours}"]), card)
