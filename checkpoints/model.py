"""The Llama architecture, just enough of it to train quickly on a CPU.

Parameter names are those of `transformers.LlamaForCausalLM`, so a state dict goes to disk as it
is. There is no cache and no generation here: the served engine has its own forward pass, and a
test holds this one equal to the one in transformers.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from checkpoints.tokenizer import END_ID, END_OF_TEXT_ID, MAX_POSITIONS, VOCAB_SIZE

INITIAL_DEVIATION = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a variant looks like; field names follow `transformers.LlamaConfig`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int = VOCAB_SIZE
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5


SHAPES = {
    "1m": Shape(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    ),
    "6m": Shape(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    ),
    "16m": Shape(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    ),
}


def huggingface_config(shape: Shape) -> dict[str, object]:
    """The `config.json` of a checkpoint of this shape."""
    fields = asdict(shape)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **fields,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": [END_OF_TEXT_ID, END_ID],
        "pad_token_id": END_OF_TEXT_ID,
        "hidden_act": "silu",
        "initializer_range": INITIAL_DEVIATION,
        "max_position_embeddings": MAX_POSITIONS,
        "mlp_bias": False,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


class RmsNorm(nn.Module):
    """Scale each vector to unit root mean square, then by a learned weight."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        exact = hidden.float()
        scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.epsilon)
        return (exact * scale * self.weight).to(hidden.dtype)


class Attention(nn.Module):
    """Causal attention with grouped keys and values and rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        query_size = shape.num_attention_heads * shape.head_dim
        key_size = shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, shape.hidden_size, bias=False)

    def forward(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        split = (batch, length, -1, self.shape.head_dim)
        query = _rotate(self.q_proj(hidden).view(split).transpose(1, 2), cosine, sine)
        key = _rotate(self.k_proj(hidden).view(split).transpose(1, 2), cosine, sine)
        value = self.v_proj(hidden).view(split).transpose(1, 2)  # (batch, kv_heads, length, head_dim)
        # The fused CPU kernel wants as many key heads as query heads.
        group = self.shape.num_attention_heads // self.shape.num_key_value_heads
        mixed = functional.scaled_dot_product_attention(
            query,
            key.repeat_interleave(group, dim=1),
            value.repeat_interleave(group, dim=1),
            is_causal=True,
        )
        output: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return output


class FeedForward(nn.Module):
    """The gated feed-forward layer (SwiGLU)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.down_proj(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return output


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to its input."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cosine, sine)
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output


class Decoder(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        cosine, sine = _rotary_table(shape)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)

    def forward(self, token_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        assert isinstance(self.cosine, Tensor) and isinstance(self.sine, Tensor)
        if positions is None:
            positions = torch.arange(token_ids.shape[1])[None]
        # (batch or 1, 1, length, head_dim), to meet heads of (batch, heads, length, head_dim)
        cosine, sine = self.cosine[positions][:, None], self.sine[positions][:, None]
        hidden: Tensor = self.embed_tokens(token_ids)
        for layer in self.layers:
            hidden = layer(hidden, cosine, sine)
        output: Tensor = self.norm(hidden)
        return output


class CausalLm(nn.Module):
    """The decoder, with its embedding read backwards as the output layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                deviation = INITIAL_DEVIATION
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    # Every layer adds to the stream twice; keep its variance at the start.
                    deviation /= (2 * shape.num_hidden_layers) ** 0.5
                nn.init.normal_(parameter, std=deviation)

    def forward(self, token_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits of the next token: (batch, length) in, (batch, length, vocab) out.

        `positions` is shaped like `token_ids`; without it each sequence counts from zero.
        """
        return functional.linear(self.model(token_ids, positions), self.model.embed_tokens.weight)


def count_parameters(model: nn.Module) -> int:
    """Parameters stored in the checkpoint; the tied embedding counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _rotary_table(shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, each (positions, head_dim)."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
    angles = torch.outer(torch.arange(MAX_POSITIONS, dtype=torch.float64), shape.rope_theta**-exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().float(), angles.sin().float()


def _rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn each pair (i, i + head_dim / 2) by its position's angle."""
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (heads * cosine + turned * sine).to(heads.dtype)
