"""All that a training process, text's preparation and the feature cache import in the end: imported by the server of forks.py."""

import importlib

from data_pipeline.core.imports import begin_imports, end_imports

MODULES = [
    *("torch._dynamo", "torch._inductor.test_operators", "safetensors.torch", "webdataset.writer"),
    *("deepspeed", "deepspeed.module_inject.auto_ep_layer", "deepspeed.comm.mori"),
    *("pretrain.train", "pretrain.engine.adamw", "pretrain.engine.muon"),
    *("pretrain.stages.vae", "pretrain.stages.dit", "pretrain.stages.samples"),
    *("data_pipeline.prepare.__main__", "data_pipeline.cache_features", "transformers.models.qwen3.modeling_qwen3"),
]

begin_imports()
for module in MODULES:
    importlib.import_module(module)
end_imports()
