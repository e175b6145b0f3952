"""The names of a prompt's KV blocks, as the scheduler, the stores and the engine know them."""

from __future__ import annotations

from collections.abc import Sequence

from trireme.gateway.models import ServedModel
from trireme.gateway.truncation import Cut
from trireme.kvcache.block_identity import (
    HashChain,
    TruncatedPrefix,
    hash_chain,
    public_blocks,
    public_root,
    tenant_root,
    truncated_prefix,
)
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest, KvJoint, KvSupply, Truncation


def name_blocks(
    admitted: AdmittedRequest, model: ServedModel, cut: Cut | None, *, fleet: str, tenant: str
) -> None:
    """Fill in salt, joints, hashes and, where the prompt may be cut, what was cut.

    `admitted.prompt_token_ids` is what stays of the prompt. Blocks inside a declared public prefix
    are shared by all tenants; all others hang on the tenant's root.
    """
    size = model.block_tokens
    whole = cut.whole_token_ids if cut is not None else list(admitted.prompt_token_ids)
    salt = tenant_root(fleet, tenant)
    chain = hash_chain(
        whole,
        size,
        salt=salt,
        public_root=public_root(fleet),
        num_public_blocks=public_blocks(whole, model.public_prefixes, size),
    )
    if cut is not None:
        prefix = _after(cut, size, chain)
        chain = prefix.chain
        admitted.truncation.CopyFrom(_truncation(cut, prefix))
    admitted.kv_salt = salt
    admitted.prefix_hashes = b"".join(chain.extend((), admitted.prompt_token_ids, size))
    admitted.kv_joints.extend(KvJoint(block=block, parent=parent) for block, parent in chain.joints)


def _after(cut: Cut, block_size: int, chain: HashChain) -> TruncatedPrefix:
    plan = cut.plan
    if not plan.cuts:
        return TruncatedPrefix(chain=chain, head_blocks=plan.head // block_size, supplies=())
    return truncated_prefix(
        cut.whole_token_ids, block_size, chain, head=plan.head, cuts=plan.cuts, window=cut.rule.window
    )


def _truncation(cut: Cut, prefix: TruncatedPrefix) -> Truncation:
    supplies: Sequence[KvSupply] = [
        KvSupply(block_hashes=b"".join(supply.hashes), shift_tokens=supply.shift_tokens)
        for supply in prefix.supplies
    ]
    return Truncation(
        head_tokens=cut.plan.head, cuts=cut.plan.cuts, turn_borders=cut.borders, supplies=supplies
    )
