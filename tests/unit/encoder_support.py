"""Tiny encoders written by transformers, with tokenizers, and what they should answer."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

LABELS = ("calm", "glad", "cross")
WORDS = ("a", "ship", "with", "three", "banks", "of", "oars", "##s", "is", "fast", "!", "?")
VOCAB = 60
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "id2label": dict(enumerate(LABELS)),
    "label2id": {label: index for index, label in enumerate(LABELS)},
}
KINDS = ("bert", "roberta", "xlm-roberta", "distilbert")


def reference_encoder(kind: str, *, classifies: bool = True, **changes: Any) -> Any:
    """A random model of transformers, the same at every call."""
    hf: Any = importlib.import_module("transformers")
    torch.manual_seed(sum(map(ord, kind)))
    name = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "distilbert": "DistilBert"}[
        kind
    ]
    sizes: dict[str, Any] = {**_SIZES, "max_position_embeddings": 64, **changes}
    if "roberta" in kind:
        sizes |= {"max_position_embeddings": 66, "pad_token_id": 1, "type_vocab_size": 1}
    if kind == "distilbert":
        names = {"dim": "hidden_size", "hidden_dim": "intermediate_size", "n_layers": "num_hidden_layers"}
        names["n_heads"] = "num_attention_heads"
        sizes |= {new: sizes.pop(old) for new, old in names.items()}
    config = getattr(hf, f"{name}Config")(**sizes)
    model = getattr(hf, f"{name}ForSequenceClassification" if classifies else f"{name}Model")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.5, 0.2)
    return model.eval()


def write_pooling(directory: Path, mode: str, *, normalises: bool) -> None:
    """As sentence-transformers describes how vectors are made."""
    types = ["Transformer", "Pooling", *(["Normalize"] if normalises else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}
        for index, (name, path) in enumerate(zip(types, paths, strict=False))
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir(exist_ok=True)
    modes = {f"pooling_mode_{name}_tokens": name == mode for name in ("mean", "max", "mean_sqrt_len")}
    fields = {"word_embedding_dimension": 32, "pooling_mode_cls_token": mode == "cls", **modes}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(fields))


def write_tokenizer(directory: Path) -> None:
    """A WordPiece tokenizer over `WORDS`, which puts [CLS] before a text and [SEP] behind it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocab = {token: index for index, token in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(special)
    tokenizer.enable_truncation(16)
    tokenizer.save(str(directory / "tokenizer.json"))


def expected_vector(model: Any, token_ids: Sequence[int], mode: str, *, normalises: bool) -> torch.Tensor:
    """By transformers, one text alone."""
    body = getattr(model, model.base_model_prefix, model)
    with torch.inference_mode():
        states = body(torch.tensor([list(token_ids)])).last_hidden_state[0]
    vector = {"cls": states[0], "mean": states.mean(0), "max": states.amax(0)}[mode]
    return vector / vector.norm() if normalises else vector


def expected_logits(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    """By transformers, one text alone."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([list(token_ids)])).logits[0]
        return logits
