"""A causal TokenTransformer as the class of transformers that computes the same: GPT-NeoX with serial residuals and full rotation.

It needs no code of this repository, and generates with a cache of keys and values.

Shape letters: D width, H heads, K head dim.
"""

import functools
from collections.abc import Callable

import torch
from torch.nn import LayerNorm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from .shapes import TokenTransformerConfig
from .token_transformer import TokenTransformer


def stock_language_model(model: TokenTransformer, start_id: int, max_window: int) -> GPTNeoXForCausalLM:
    """The same function, on the CPU in fp32 with copied weights, in eval mode.

    Args:
        start_id: the token that every text begins with; it becomes `bos_token_id`. Generation ends at it too: it ends texts.
        max_window: longest text in tokens, without that one.

    Raises: ValueError for a model that GPT-NeoX cannot be: with roles, marks, or norms of queries and keys.
    """
    shape = model.config
    if model.role is not None or model.embedding.num_embeddings != shape.vocab_size:
        raise ValueError("GPT-NeoX has neither roles nor marks")
    stock = GPTNeoXForCausalLM(stock_config(shape, start_id, max_window))
    ours = model.state_dict()
    stock.load_state_dict(
        {name: stock_weight(name, shape, ours.__getitem__).float().cpu() for name in stock.state_dict()}
    )
    return stock.eval()


def stock_config(shape: TokenTransformerConfig, start_id: int, max_window: int) -> GPTNeoXConfig:
    """The shape of that class. Raises: ValueError for norms of queries and keys."""
    if shape.qk_norm:
        raise ValueError("GPT-NeoX has no norms of queries and keys (qk_norm)")
    return GPTNeoXConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.width // shape.head_dim,
        intermediate_size=4 * shape.width,
        hidden_act="gelu_pytorch_tanh",
        max_position_embeddings=max_window + 1,
        layer_norm_eps=LayerNorm(1).eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta, "partial_rotary_factor": 1.0},
        use_parallel_residual=False,
        attention_bias=True,
        tie_word_embeddings=False,
        bos_token_id=start_id,
        eos_token_id=start_id,
    )


_NAMES = {
    "gpt_neox.embed_in.": "embedding.",
    "gpt_neox.final_layer_norm.": "transformer.norm.",
    "gpt_neox.layers.": "transformer.blocks.",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".mlp_norm.",
    ".attention.query_key_value.": ".attention.qkv.",
    ".attention.dense.": ".attention.out.",
    ".mlp.dense_h_to_4h.": ".mlp_in.",
    ".mlp.dense_4h_to_h.": ".mlp_out.",
}
"""Parts of GPT-NeoX's names, and ours."""


def stock_weight(name: str, shape: TokenTransformerConfig, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """The weight that GPT-NeoX calls so, out of a TokenTransformer's, which `read` gives by name; one of ours makes one of theirs.

    Queries, keys and values of one head lie together in GPT-NeoX.
    """
    ours = our_name(name)
    tensor = read(ours)
    if ".qkv." not in ours:
        return tensor
    return tensor.view(3, -1, shape.head_dim, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


def our_weight(name: str, head_dim: int, tensor: torch.Tensor) -> torch.Tensor:
    """The way back: the weight of a TokenTransformer, of that which GPT-NeoX calls `name`."""
    if ".qkv." not in our_name(name):
        return tensor
    return tensor.view(-1, 3, head_dim, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


def our_name(name: str) -> str:
    """What a TokenTransformer calls the weight that GPT-NeoX calls `name`."""
    return functools.reduce(lambda found, pair: found.replace(*pair), _NAMES.items(), name)


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
