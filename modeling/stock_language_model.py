"""A causal TokenTransformer as the class of transformers that computes the same: GPT-NeoX with serial residuals and full rotation.

It needs no code of this repository, and generates with a cache of keys and values.

Shape letters: D width, H heads, K head dim.
"""

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from .token_transformer import TokenTransformer


def stock_language_model(model: TokenTransformer, start_id: int, max_window: int) -> GPTNeoXForCausalLM:
    """The same function, on the CPU in fp32 with copied weights, in eval mode.

    Args:
        start_id: the token that every text begins with; it becomes `bos_token_id`. Generation ends at it too: it ends texts.
        max_window: longest text in tokens, without that one.

    Raises: ValueError for a model that GPT-NeoX cannot be: with roles, marks, or norms of queries and keys.
    """
    shape = model.config
    if model.role is not None or model.embedding.num_embeddings != shape.vocab_size or shape.qk_norm:
        raise ValueError("GPT-NeoX has neither roles nor marks nor norms of queries and keys (qk_norm)")
    config = GPTNeoXConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.width // shape.head_dim,
        intermediate_size=4 * shape.width,
        hidden_act="gelu_pytorch_tanh",
        max_position_embeddings=max_window + 1,
        layer_norm_eps=model.transformer.norm.eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta, "partial_rotary_factor": 1.0},
        use_parallel_residual=False,
        attention_bias=True,
        tie_word_embeddings=False,
        bos_token_id=start_id,
        eos_token_id=start_id,
    )
    stock = GPTNeoXForCausalLM(config)
    stock.load_state_dict({name: tensor.float().cpu() for name, tensor in _renamed(model).items()})
    return stock.eval()


def _renamed(model: TokenTransformer) -> dict[str, torch.Tensor]:
    """The weights by GPT-NeoX's names and in its order: queries, keys and values of one head lie together."""
    found = {"gpt_neox.embed_in.weight": model.embedding.weight, "lm_head.weight": model.lm_head.weight}
    found |= {f"gpt_neox.final_layer_norm.{name}": p for name, p in model.transformer.norm.named_parameters()}
    parts = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention.out": "attention.dense",
        "mlp_in": "mlp.dense_h_to_4h",
        "mlp_out": "mlp.dense_4h_to_h",
    }
    for i, block in enumerate(model.transformer.blocks):
        for ours, theirs in parts.items():
            for name, p in block.get_submodule(ours).named_parameters():
                found[f"gpt_neox.layers.{i}.{theirs}.{name}"] = p
        for name, p in block.get_submodule("attention.qkv").named_parameters():
            by_head = p.view(3, -1, model.config.head_dim, *p.shape[1:]).transpose(0, 1)
            found[f"gpt_neox.layers.{i}.attention.query_key_value.{name}"] = by_head.reshape(p.shape)
    return {name: tensor.detach() for name, tensor in found.items()}


def continuation(stock: GPTNeoXForCausalLM, context_T: torch.Tensor, new: int, seed: int) -> list[int]:
    """`new` tokens behind a context, drawn one by one from the model's probabilities; a text's end does not end them."""
    start = torch.tensor([stock.config.bos_token_id])
    ids = torch.cat((start, context_T.cpu()))[None].to(stock.device)
    with torch.random.fork_rng(devices=[stock.device] if stock.device.type == "cuda" else []):
        torch.manual_seed(seed)
        tokens = stock.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=True,
            top_k=0,
            eos_token_id=None,
            pad_token_id=0,
        )
    return tokens[0, ids.shape[1] :].tolist()
