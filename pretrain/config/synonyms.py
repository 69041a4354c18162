"""What other trainers call our keys: a name that no likeness would lead to the right one."""

from collections.abc import Collection

SYNONYMS: dict[str, tuple[str, ...]] = {
    "optimizer.lr": ("learning_rate", "max_lr", "peak_lr", "base_lr", "lr_peak"),
    "optimizer.betas": ("adam_beta1", "adam_beta2", "beta1", "beta2", "adam_betas", "momentum"),
    "optimizer.eps": ("adam_epsilon", "adam_eps", "epsilon"),
    "optimizer.weight_decay": ("wd", "decay", "l2"),
    "optimizer.grad_clip": ("max_grad_norm", "max_norm", "clip_grad", "clip_grad_norm", "gradient_clip_val", "gradient_clipping"),
    "optimizer.ema_decay": ("ema", "ema_rate", "ema_beta", "polyak"),
    "schedule.kind": ("lr_scheduler_type", "lr_scheduler", "scheduler", "lr_schedule", "lr_decay_style"),
    "schedule.warmup_steps": ("warmup", "warmup_iters", "num_warmup_steps", "lr_warmup_iters", "warmup_ratio"),
    "schedule.min_ratio": ("min_lr", "lr_min", "eta_min", "min_lr_ratio"),
    "schedule.decay_steps": ("lr_decay_iters", "lr_decay_steps", "cooldown_steps"),
    "data.path": ("data_path", "dataset", "dataset_path", "train_data", "data_dir", "dataset_name"),
    "data.rows_per_step": ("batch_size", "global_batch_size", "train_batch_size", "total_batch_size"),
    "data.micro_batch_rows": (
        "micro_batch_size", "per_device_train_batch_size", "device_batch_size", "batch_size_per_gpu", "gradient_accumulation_steps",
        "grad_accum_steps", "accumulate_grad_batches", "train_micro_batch_size_per_gpu", "batch_size",
    ),
    "data.workers": ("num_workers", "dataloader_num_workers", "prefetch_factor", "prefetch"),
    "train.run": ("output_dir", "out_dir", "save_dir", "run_dir", "save", "output", "exp_name", "run_name"),
    "train.steps": ("max_steps", "num_steps", "total_steps", "train_iters", "max_iters", "iterations", "num_train_steps", "epochs",
                    "num_epochs", "num_train_epochs", "max_epochs"),
    "train.seed": ("random_seed", "manual_seed"),
    "train.precision": ("bf16", "fp16", "fp32", "dtype", "mixed_precision", "amp", "torch_dtype", "half"),
    "train.zero_stage": ("zero", "zero_optimization", "stage3", "fsdp", "sharding_strategy"),
    "train.offload_optimizer": ("cpu_offload", "offload"),
    "train.activation_checkpointing": ("gradient_checkpointing", "recompute", "recompute_activations", "checkpoint_activations"),
    "train.compile": ("torch_compile", "use_compile", "compile_model"),
    "train.checkpoint_every": ("save_steps", "save_interval", "save_every", "checkpoint_interval", "save_freq"),
    "train.keep_last": ("save_total_limit", "keep_last_n", "max_checkpoints", "keep"),
    "train.eval_every": ("eval_steps", "eval_interval", "validation_interval", "val_check_interval", "eval_freq"),
    "train.eval_rows": ("eval_iters", "eval_batches", "max_eval_samples"),
    "train.log_every": ("logging_steps", "log_interval", "print_freq", "log_freq"),
    "train.timeout_s": ("ddp_timeout", "nccl_timeout", "distributed_timeout_minutes"),
    "telemetry.wandb": ("report_to", "use_wandb", "wandb_log"),
    "telemetry.wandb_project": ("project", "project_name"),
    "telemetry.tensorboard": ("tensorboard_dir", "use_tensorboard"),
    "model.width": ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "hidden_dim", "model_dim", "embedding_size"),
    "model.num_layers": ("num_hidden_layers", "n_layer", "n_layers", "depth", "layers", "num_blocks"),
    "model.num_encoder_layers": ("num_layers", "num_hidden_layers", "n_layer", "n_layers", "depth", "layers", "encoder_layers"),
    "model.num_decoder_layers": ("num_layers", "num_hidden_layers", "n_layer", "n_layers", "depth", "layers", "decoder_layers"),
    "model.head_dim": ("num_heads", "num_attention_heads", "n_head", "n_heads", "heads", "d_head", "head_size"),
    "model.vocab_size": ("n_vocab", "padded_vocab_size", "num_embeddings"),
    "model.rope_theta": ("rope_base", "rotary_base"),
    "model.latent_dim": ("z_dim", "latent_channels", "latent_size", "in_channels"),
    "diagnose.guidance_scale": ("cfg", "cfg_scale", "guidance"),
    "kl.weight": ("beta", "kl_weight", "kl_beta"),
    "repa.weight": ("repa_weight", "repa_lambda", "proj_coeff"),
    "flow.context_drop": ("cfg_dropout", "uncond_prob", "class_dropout_prob", "p_uncond"),
}  # fmt: skip
"""Our key -> what DeepSpeed, Hugging Face's trainer, Megatron, nanoGPT, Lightning and DiT's trainers say."""


def ours(key: str, known: Collection[str]) -> list[str]:
    """The keys among `known` for which other trainers use the name that `key` ends in."""
    name = key.rpartition(".")[2].lower().replace("-", "_")
    return [own for own, others in SYNONYMS.items() if name in others and own in known]
