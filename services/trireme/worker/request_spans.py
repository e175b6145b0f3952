"""What a worker did for a request, as spans below the phases that its gateway cuts its time into."""

from __future__ import annotations

from trireme.runtime.spans import Attribute, Moment, SpanRef, Spans, span_ref
from trireme.worker.live_requests import LiveRequest


def put_spans(spans: Spans, request: LiveRequest, worker_id: str) -> None:
    """Tell of an attempt that has just ended."""
    admitted = request.assignment.request
    root = span_ref(admitted.traceparent)
    if root is None or not root.sampled:
        return
    own: dict[str, Attribute] = {
        "trireme.request_id": request.request_id,
        "trireme.worker_id": worker_id,
        "trireme.variant": request.variant,
        "trireme.attempt": admitted.attempt,
    }
    started_unix_s = request.started_unix_s or request.ended_unix_s
    first_unix_s = request.first_token_unix_s or request.ended_unix_s

    def put(
        name: str,
        phase: str,
        start_unix_s: float,
        end_unix_s: float,
        more: dict[str, Attribute],
        moments: tuple[Moment, ...] = (),
    ) -> None:
        spans.put(
            name,
            None,
            parent=_phase_of(root, phase, goes_on=any(choice.first_index for choice in request.choices)),
            start_unix_s=start_unix_s,
            end_unix_s=end_unix_s,
            attributes=own | more,
            moments=moments,
        )

    put("trireme.worker.wait", "engine_queue", request.received_unix_s, started_unix_s, {})
    if request.kv_load[1]:
        loaded: dict[str, Attribute] = {"trireme.kv_loaded_blocks": request.kv_loaded_blocks}
        put("trireme.worker.kv_load", "engine_queue", *request.kv_load, loaded)
    if request.started_unix_s:
        cached: dict[str, Attribute] = {
            "trireme.prompt_tokens": len(admitted.prompt_token_ids),
            "trireme.cached_tokens": request.cached_prompt_tokens,
        }
        put("trireme.worker.prefill", "prefill", started_unix_s, first_unix_s, cached)
    if request.first_token_unix_s:
        used: dict[str, Attribute] = {
            "trireme.tokens": sum(len(choice.token_ids) for choice in request.choices),
            "trireme.engine_s": request.engine_s,
            "trireme.energy_joules": request.joules,
            "trireme.preemptions": request.num_stops,
        }
        stops = tuple(request.stops)
        put("trireme.worker.decode", "decode", first_unix_s, request.ended_unix_s, used, stops)


def _phase_of(root: SpanRef, phase: str, *, goes_on: bool) -> SpanRef:
    # What follows a lost worker's tokens belongs to the phase that these had begun.
    return root.phase("decode" if goes_on else phase)
