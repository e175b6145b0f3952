"""A request inside a simulated engine, and the block pools that count what it holds."""

from __future__ import annotations

from dataclasses import dataclass

from trireme.errors import InvalidConfiguration
from trireme.policies.iteration import Location
from trireme.simulator.requests import Request


class Sequence:
    """One request's state. Times are seconds of the simulated clock; NaN until they are known."""

    __slots__ = (
        "answer_tokens",
        "arrival_s",
        "blocks",
        "cached_tokens",
        "computed",
        "finish_s",
        "first_token_s",
        "generated",
        "location",
        "most_computed",
        "preemptions",
        "recomputed_tokens",
        "request",
        "sequence_id",
        "stall_s",
        "target",
        "worker",
    )

    def __init__(self, request: Request, *, arrival_s: float) -> None:
        self.request = request
        self.sequence_id = request.request_id
        self.arrival_s = arrival_s
        self.answer_tokens = request.answer_tokens
        self.target = request.prompt_tokens
        """Tokens whose KV it needs before it can choose the next."""
        self.computed = 0
        """Tokens whose KV it has."""
        self.most_computed = 0
        self.generated = 0
        self.blocks = 0
        """Held on the device; while it moves, those of both ends."""
        self.location = Location.NONE
        self.cached_tokens = 0
        """Found in a tier at arrival."""
        self.stall_s = 0.0
        """Wait for that KV which its first iteration does not hide."""
        self.first_token_s = float("nan")
        self.finish_s = float("nan")
        self.preemptions = 0
        self.recomputed_tokens = 0
        self.worker = 0


@dataclass(slots=True)
class Pools:
    """Counts of blocks: on the device free + draining + held = total, on the host free + held = total."""

    device_blocks: int
    host_blocks: int
    device_free: int = 0
    device_draining: int = 0
    """Sources of copies that have not ended: not free yet."""
    host_free: int = 0

    def __post_init__(self) -> None:
        if self.device_blocks < 1 or self.host_blocks < 0:
            raise InvalidConfiguration(
                f"{self.device_blocks} device and {self.host_blocks} host blocks: there must be at least "
                "1 and 0",
                param="--kv-blocks",
            )
        self.device_free = self.device_blocks
        self.host_free = self.host_blocks

    @property
    def device_held(self) -> int:
        """Blocks that sequences hold."""
        return self.device_blocks - self.device_free - self.device_draining

    @property
    def host_held(self) -> int:
        """Blocks of swapped-out sequences."""
        return self.host_blocks - self.host_free
