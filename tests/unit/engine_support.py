"""Tiny checkpoints written by transformers, and engines around them."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from trireme.engine import Engine, EngineSettings, SamplingParams, SequenceRequest, StepResult, TokenOutput

VOCAB = 120
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.0, 2.0, 5.0, 9.0],
}
ARCHITECTURES = (
    *(
        "llama2",
        "llama3",
        "llama_linear",
        "mistral",
        "qwen2",
        "qwen2_window",
        "qwen3",
        "mixtral",
        "qwen3_moe",
    ),
    *("phi3_partial", "gemma", "gemma2", "gemma3"),
    "gpt2",
)
SHARDED = ("llama3", "gpt2")


def reference_model(name: str) -> Any:
    """A random model of transformers, the same at every call."""
    hf: Any = importlib.import_module("transformers")
    torch.manual_seed(sum(map(ord, name)))
    sizes = dict(_SIZES)
    gqa = {**sizes, "num_key_value_heads": 2}
    match name:
        case "llama2":
            config = hf.LlamaConfig(**sizes)
            return hf.LlamaForCausalLM(config).eval()
        case "llama3":
            config = hf.LlamaConfig(**gqa, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)
            return hf.LlamaForCausalLM(config).eval()
        case "llama_linear":
            rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
            config = hf.LlamaConfig(**gqa, rope_parameters=rope, attention_bias=True, mlp_bias=True)
            return _with_random_biases(hf.LlamaForCausalLM(config))
        case "mistral":
            config = hf.MistralConfig(**gqa, sliding_window=20)
            return hf.MistralForCausalLM(config).eval()
        case "qwen2":
            return _with_random_biases(hf.Qwen2ForCausalLM(hf.Qwen2Config(**gqa)))
        case "qwen2_window":
            config = hf.Qwen2Config(**gqa, use_sliding_window=True, sliding_window=20, max_window_layers=1)
            return _with_random_biases(hf.Qwen2ForCausalLM(config))
        case "qwen3":
            return hf.Qwen3ForCausalLM(hf.Qwen3Config(**gqa, head_dim=16)).eval()
        case "mixtral":
            config = hf.MixtralConfig(**gqa, num_local_experts=4, num_experts_per_tok=2)
            return hf.MixtralForCausalLM(config).eval()
        case "qwen3_moe":
            experts = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
            config = hf.Qwen3MoeConfig(**gqa, head_dim=16, mlp_only_layers=[0], **experts)
            return hf.Qwen3MoeForCausalLM(config).eval()
        case "phi3_longrope":
            config = hf.Phi3Config(**gqa, rope_parameters=LONGROPE, original_max_position_embeddings=64)
            return hf.Phi3ForCausalLM(config).eval()
        case "phi3_partial":
            rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
            config = hf.Phi3Config(**gqa, rope_parameters=rope, sliding_window=20)
            return hf.Phi3ForCausalLM(config).eval()
        case "gemma":
            config = hf.GemmaConfig(**gqa, head_dim=16)
            return _with_random_norms(hf.GemmaForCausalLM(config))
        case "gemma2":
            gemma = {**gqa, "num_hidden_layers": 3, "head_dim": 16, "query_pre_attn_scalar": 24}
            caps = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}
            config = hf.Gemma2Config(**gemma, **caps, sliding_window=20)
            return _with_random_norms(hf.Gemma2ForCausalLM(config))
        case "gemma3":
            types = ["sliding_attention", "full_attention", "sliding_attention"]
            gemma = {**gqa, "num_hidden_layers": 3, "layer_types": types}
            gemma |= {"head_dim": 16, "query_pre_attn_scalar": 24}
            rope = {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
            config = hf.Gemma3TextConfig(**gemma, rope_parameters=rope, sliding_window=20)
            return _with_random_norms(hf.Gemma3ForCausalLM(config))
        case "gpt2":
            config = hf.GPT2Config(
                vocab_size=VOCAB,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=512,
                initializer_range=0.3,
                bos_token_id=None,
                eos_token_id=None,
            )
            return _with_random_biases(hf.GPT2LMHeadModel(config))
    raise ValueError(name)


def _with_random_biases(model: Any) -> Any:
    """Biases start as zeros, which would hide a missing one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
    return model.eval()


def _with_random_norms(model: Any) -> Any:
    """Norms start as zeros in Gemma, which would hide one that is not applied."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(0.0, 0.3)
    return model.eval()


def save(model: Any, directory: Path, *, shard_size: str = "1GB") -> Path:
    """Write a checkpoint as transformers does."""
    model.save_pretrained(directory, max_shard_size=shard_size)
    return directory


def settings(**changes: Any) -> EngineSettings:
    """A small engine."""
    values: dict[str, Any] = {
        "num_blocks": 256,
        "block_size": 8,
        "max_num_seqs": 8,
        "max_batch_tokens": 24,
        **changes,
    }
    return EngineSettings(**values)


def greedy(max_tokens: int, **changes: Any) -> SamplingParams:
    """The likeliest tokens."""
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **changes)


def request(
    sequence_id: str, prompt: Sequence[int], sampling: SamplingParams, **changes: Any
) -> SequenceRequest:
    """One sequence."""
    return SequenceRequest(
        sequence_id=sequence_id, prompt_token_ids=tuple(prompt), sampling=sampling, **changes
    )


def run(engine: Engine, *, max_steps: int = 5000) -> list[StepResult]:
    """Step until nothing is left."""
    results: list[StepResult] = []
    while engine.has_work:
        results.append(engine.step())
        assert len(results) < max_steps, "the engine makes no progress"
    return results


def outputs_of(results: Iterable[StepResult]) -> dict[str, list[TokenOutput]]:
    """All outputs, per sequence."""
    outputs: dict[str, list[TokenOutput]] = {}
    for result in results:
        for output in result.outputs:
            outputs.setdefault(output.sequence_id, []).append(output)
    return outputs


def tokens_of(results: Iterable[StepResult]) -> dict[str, list[int]]:
    """All tokens, per sequence; their indices must be without gaps."""
    tokens: dict[str, list[int]] = {}
    for name, outputs in outputs_of(results).items():
        first = outputs[0].index
        assert [output.index for output in outputs] == list(range(first, first + len(outputs)))
        tokens[name] = [output.token_id for output in outputs if output.token_id is not None]
    return tokens


def answer(engine: Engine, prompt: Sequence[int], sampling: SamplingParams, **changes: Any) -> list[int]:
    """The tokens of one sequence that runs alone."""
    engine.add(request("alone", prompt, sampling, **changes))
    return tokens_of(run(engine))["alone"]


def prompt_of(seed: int, length: int, vocab: int = VOCAB) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(0, vocab, (length,), generator=generator).tolist()
    return ids
