"""How a checkpoint's linear layers are to be read: as they are, from stored codes, or quantized now."""

from __future__ import annotations

from trireme.errors import InvalidConfiguration
from trireme.models.checkpoint import Checkpoint
from trireme.quant import foreign_schemes, manifest
from trireme.quant.few_bit_weights import FewBitWeights, QuantizedAtLoad
from trireme.quant.foreign import ForeignCheckpoint
from trireme.quant.format_choice import nearest_format
from trireme.quant.precisions import AUTO, candidate_formats
from trireme.quant.reading import QuantizedCheckpoint


def open_few_bits(checkpoint: Checkpoint, precision: str) -> FewBitWeights | None:
    """Open the linear layers of a checkpoint in few bits; None: they stay in high precision.

    Args:
        checkpoint: an open checkpoint.
        precision: one of `quant.precisions`. `auto` takes what is stored. A format takes stored codes of that
            format, or quantizes weights that are stored in high precision.

    Raises:
        InvalidConfiguration: there is no such precision, or the checkpoint holds codes of another format.
        InvalidCheckpoint: the files of a quantized checkpoint are damaged.
    """
    candidates = candidate_formats(precision)
    stored = _stored(checkpoint)
    if stored is not None:
        if precision == AUTO or stored.form in candidates:
            return stored
        stored.close()
        raise InvalidConfiguration(
            f"{checkpoint.directory} holds {stored.form.name}, not {precision}: name the checkpoint that it "
            f"was made from, or precision {stored.form.name}",
            param="precision",
        )
    if not candidates:
        return None
    directory = checkpoint.directory
    return QuantizedAtLoad(directory, nearest_format(directory, candidates))


def weights_key(checkpoint: Checkpoint, few_bits: FewBitWeights | None) -> str:
    """What identifies the weights that are computed with: equal keys, equal weights.

    KV blocks are found by it, so those of one precision are never taken for those of another.
    """
    fingerprint = checkpoint.fingerprint()
    return f"{fingerprint}:{few_bits.form.name}" if isinstance(few_bits, QuantizedAtLoad) else fingerprint


def _stored(checkpoint: Checkpoint) -> FewBitWeights | None:
    if checkpoint.raw_config.get(foreign_schemes.KEY) is not None:
        return ForeignCheckpoint(checkpoint.directory)
    return QuantizedCheckpoint(checkpoint.directory) if manifest.KEY in checkpoint.raw_config else None
