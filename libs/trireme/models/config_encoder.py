"""BERT, RoBERTa, XLM-RoBERTa and DistilBERT, read from a `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from trireme.errors import InvalidCheckpoint
from trireme.models.config import EncoderConfig, Family, ModelConfig
from trireme.models.config_fields import Fields

ENCODER_TYPES: Final = ("bert", "roberta", "xlm-roberta", "distilbert")
_ACTIVATIONS: Final = ("gelu", "gelu_new", "relu")
_MOST_LABELS: Final = 4096
_HEAD: Final = "ForSequenceClassification"


def parse_encoder(fields: Fields, model_type: str) -> ModelConfig:
    """Read an encoder.

    Raises:
        InvalidCheckpoint: a field is missing or malformed, or the model is made to decode.
    """
    if fields.flag("is_decoder", False):
        raise InvalidCheckpoint(f"{fields.source}: is_decoder is set; a {model_type} is served as an encoder")
    kind = fields.text("position_embedding_type", "absolute")
    if kind != "absolute":
        raise fields.bad("position_embedding_type", "absolute")
    is_distilled = model_type == "distilbert"
    hidden_size = fields.count("dim" if is_distilled else "hidden_size")
    num_heads = fields.count("n_heads" if is_distilled else "num_attention_heads")
    if hidden_size % num_heads:
        raise InvalidCheckpoint(
            f"{fields.source}: a hidden size of {hidden_size} is not a multiple of {num_heads} heads"
        )
    padding = None
    max_positions = fields.count("max_position_embeddings", 512)
    if model_type in ("roberta", "xlm-roberta"):
        padding = fields.index("pad_token_id", 1)
        if max_positions <= padding + 1:
            raise fields.bad("max_position_embeddings", f"over {padding + 1}: positions begin there")
    return ModelConfig(
        model_type=model_type,
        family=Family.ENCODER,
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.count("hidden_dim" if is_distilled else "intermediate_size"),
        num_layers=fields.count("n_layers" if is_distilled else "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        max_positions=max_positions - (0 if padding is None else padding + 1),
        norm_eps=1e-12 if is_distilled else fields.number("layer_norm_eps", 1e-12),
        activation=fields.one_of("activation" if is_distilled else "hidden_act", "gelu", _ACTIVATIONS),
        tie_embeddings=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        encoder=EncoderConfig(
            padding_id=padding,
            token_types=0 if is_distilled else fields.count("type_vocab_size", 2),
            labels=_labels(fields),
            is_multi_label=fields.raw.get("problem_type") == "multi_label_classification",
        ),
    )


def _labels(fields: Fields) -> tuple[str, ...]:
    """The names of the classes, in order; none where there is no head that classifies."""
    architectures = fields.raw.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise fields.bad("architectures", "a list of names")
    if not any(name.endswith(_HEAD) for name in architectures):
        return ()
    names = fields.raw.get("id2label")
    if names is None:
        return tuple([f"LABEL_{index}" for index in range(fields.count("num_labels", 2))])
    if not isinstance(names, Mapping) or not 1 <= len(names) <= _MOST_LABELS:
        raise fields.bad("id2label", f"an object of 1 to {_MOST_LABELS} names")
    ordered = [names.get(str(index), names.get(index)) for index in range(len(names))]
    labels = [name for name in ordered if isinstance(name, str)]
    if len(labels) < len(names) or len(set(labels)) < len(labels):
        raise fields.bad("id2label", f"a name of its own for each id from 0 to {len(names) - 1}")
    return tuple(labels)
