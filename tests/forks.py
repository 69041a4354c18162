"""One server for the whole suite from which tests fork processes that have what takes seconds to import behind them.

A process of Python has one such server, whoever asks first: so there is one list of what it imports.
"""

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("torch._dynamo", "torch._inductor.test_operators", "safetensors.torch", "webdataset.writer"),
        *("deepspeed", "deepspeed.module_inject.auto_ep_layer", "deepspeed.comm.mori"),
        *("pretrain.train", "pretrain.engine.adamw", "pretrain.engine.muon"),
        *("pretrain.stages.vae", "pretrain.stages.dit", "pretrain.stages.samples"),
        *("data_pipeline.prepare.__main__", "data_pipeline.cache_features"),
    ]
)
"""All that a training process, text's preparation and the feature cache import in the end."""
