"""One client's view of a live request: what is new since it last looked.

A client that is slow costs nothing but the tokens that the request keeps anyway: what came
meanwhile is merged into the next delta.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from trireme.errors import ServiceUnavailable
from trireme.gateway.audit import AuditedCall
from trireme.gateway.events import Accepted, ChoiceFinished, Delta, Event, Summary
from trireme.gateway.live_request import LiveRequest
from trireme.gateway.metrics import Metrics
from trireme.gateway.quotas import Reservation
from trireme.gateway.truncation import dropped_tokens
from trireme.wire.inference.v1.inference_pb2 import Usage


class Answer:
    """Reads one live request, from `resume_from` tokens of each choice on.

    Close it when the client is served or gone; `on_close(answer)` decides what that means.
    """

    def __init__(
        self,
        live: LiveRequest,
        *,
        resume_from: tuple[int, ...],
        attached: bool,
        flush_interval_s: Callable[[], float],
        usage_wait_s: float,
        metrics: Metrics,
        on_close: Callable[[Answer], None],
    ) -> None:
        self.live = live
        self.delivered = False
        """True after the Summary was handed out."""
        self.let_go = False
        """Set before `close`: the request goes on for another gateway, whatever was delivered here."""
        self.attached = attached
        """Another call had made the request."""
        self.reservation: Reservation | None = None
        """What the call took of its tenant's quota."""
        self.audited: AuditedCall | None = None
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._flush_interval_s = flush_interval_s
        self._usage_wait_s = usage_wait_s
        self._on_close = on_close
        admitted = live.admitted
        self._accepted = Accepted(
            len(admitted.prompt_token_ids), admitted.sampling.seed, attached, dropped_tokens(admitted)
        )
        self._accepted_s = self._loop.time()
        self.first_delivery_unix_s = 0.0
        """When the first tokens were handed out; 0: none were."""
        self._first_token_s = 0.0
        self._last_token_s = 0.0
        self._taken = [*resume_from, *[0] * len(live.choices)][: len(live.choices)]
        self._finished = [False] * len(live.choices)
        self._prompt_shown = [taken > 0 for taken in self._taken]
        self._pauses_seen = 0
        self._started = False
        self._closed = False
        self._flush_s = 0.0
        self._wake = asyncio.Event()
        self._wake.set()
        self._timer: asyncio.TimerHandle | None = None
        live.listeners.append(self._heard)

    async def news(self, *, timeout_s: float | None = None) -> list[Event]:
        """The next events, at least one; none after `timeout_s` without any. Empty after the Summary.

        Raises:
            TriremeError: the request cannot be answered.
        """
        deadline_s = None if timeout_s is None else self._loop.time() + timeout_s
        while not self.delivered:
            if not self._wake.is_set() and not await self._wait(deadline_s):
                return []
            self._wake.clear()
            events = self._take()
            if events:
                return events
            if self.live.error is not None:
                raise self.live.error
        return []

    def hear_only_the_end(self) -> None:
        """Merge everything: for clients that want the whole answer at once."""
        self._flush_interval_s = lambda: math.inf

    def close(self) -> None:
        """The client is served or gone; closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self.live.listeners.remove(self._heard)
        self._on_close(self)

    def displace(self) -> None:
        """End this view: its gateway leaves and its client resumes elsewhere."""
        if not self._closed:
            leaving = "this gateway is leaving: resume at another one"
            self.live.fail(ServiceUnavailable(leaving, retry_after_s=0.1))

    async def _wait(self, deadline_s: float | None) -> bool:
        if self.live.ended_s is not None and not self.live.accounted:
            accounting_s = self.live.ended_s + self._usage_wait_s
            deadline_s = accounting_s if deadline_s is None else min(deadline_s, accounting_s)
            if self._loop.time() >= accounting_s:
                self._wake.set()
                return True
        if deadline_s is None:
            await self._wake.wait()
            return True
        try:
            async with asyncio.timeout_at(deadline_s):
                await self._wake.wait()
        except TimeoutError:
            if self.live.ended_s is not None and self._loop.time() >= self.live.ended_s + self._usage_wait_s:
                self._wake.set()
                return True
            return False
        return True

    def _heard(self, urgent: bool) -> None:
        if self._wake.is_set() or (self._timer is not None and not urgent):
            return
        if urgent or not self._last_token_s or self._loop.time() >= self._flush_s:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._wake.set()
        elif self._flush_s < math.inf:
            self._timer = self._loop.call_at(self._flush_s, self._flush)

    def _flush(self) -> None:
        self._timer = None
        self._wake.set()

    def _take(self) -> list[Event]:
        live = self.live
        events: list[Event] = []
        if not self._started:
            self._started = True
            events.append(self._accepted)
        if self._pauses_seen < len(live.pauses):
            events.extend(live.pauses[self._pauses_seen :])
            self._pauses_seen = len(live.pauses)
        tokens = 0
        for number, choice in enumerate(live.choices):
            if self._finished[number]:
                continue
            taken, have = self._taken[number], len(choice.token_ids)
            lone_tail = bool(choice.ended and choice.tail) and have == taken and not self._skips_tail(number)
            prompt_logprobs = () if self._prompt_shown[number] else choice.prompt_logprobs
            if have > taken or lone_tail or (prompt_logprobs and choice.ended):
                texts = choice.texts[taken:have]
                if choice.ended and choice.tail:
                    texts = [*texts[:-1], texts[-1] + choice.tail] if texts else [choice.tail]
                events.append(
                    Delta(
                        number,
                        taken,
                        choice.token_ids[taken:have].tolist(),
                        texts[0] if len(texts) == 1 else "".join(texts),
                        texts,
                        choice.logprobs[taken:have],
                        prompt_logprobs,
                    )
                )
                self._prompt_shown[number] = True
                tokens += have - taken
                self._taken[number] = have
            if choice.ended:
                self._finished[number] = True
                events.append(ChoiceFinished(number, choice.reason, choice.stop_string))
        if tokens:
            self._note_tokens(tokens)
        if live.error is None and live.ended and (live.accounted or self._waited_enough()):
            events.append(self._summary())
            self.delivered = True
        return events

    def _skips_tail(self, number: int) -> bool:
        # A client that resumed with all tokens got the tail with the last one.
        return self._accepted.attached and self._taken[number] > 0 and not self._last_token_s

    def _waited_enough(self) -> bool:
        ended_s = self.live.ended_s
        return ended_s is not None and self._loop.time() >= ended_s + self._usage_wait_s

    def _note_tokens(self, tokens: int) -> None:
        now_s = self._loop.time()
        if not self._last_token_s:
            self._first_token_s = now_s - self._accepted_s
            self.first_delivery_unix_s = time.time()
            self._metrics.first_token.observe(self._first_token_s)
        else:
            self._metrics.inter_token.observe((now_s - self._last_token_s) / tokens)
        self._metrics.tokens.inc(tokens)
        self._last_token_s = now_s
        self._flush_s = now_s + self._flush_interval_s()

    def _summary(self) -> Summary:
        live = self.live
        usage = live.usage or Usage()
        admitted = live.admitted
        queue_s = live.started_unix_s - admitted.admitted_unix_s if live.started_unix_s else 0.0
        total_s = self._loop.time() - self._accepted_s
        self._metrics.end_to_end.observe(total_s)
        return Summary(
            prompt_tokens=len(admitted.prompt_token_ids),
            cached_prompt_tokens=usage.cached_prompt_tokens,
            completion_tokens=sum(live.received()),
            truncated_tokens=max(usage.truncated_tokens, dropped_tokens(admitted)),
            engine_s=usage.engine_s,
            joules=usage.joules,
            grams_co2e=usage.grams_co2e,
            queue_s=max(0.0, queue_s),
            first_token_s=self._first_token_s,
            total_s=total_s,
            paused_s=live.paused_s,
            variant=live.variant,
            worker_id=live.worker_id,
            decision=live.decision,
            attempts=live.attempt,
        )
