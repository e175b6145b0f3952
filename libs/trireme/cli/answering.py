"""Answers in a terminal: the text as it comes, then one line about what it took."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from trireme.client import (
    Accepted,
    ChoiceFinished,
    Delta,
    Event,
    Paused,
    Sampling,
    Summary,
    SyncTriremeClient,
)


@dataclass(slots=True)
class Answer:
    """What came."""

    request_id: str = ""
    text: str = ""
    finished: ChoiceFinished | None = None
    summary: Summary | None = None
    first_s: float = 0.0
    """Until the first text was here, as this process saw it; resumptions included."""
    total_s: float = 0.0


def print_answer(events: Iterator[Event]) -> Answer:
    """Print the text as it comes; pauses are told on standard error."""
    answer, begun_s = Answer(), time.monotonic()
    for event in events:
        match event:
            case Accepted():
                answer.request_id = event.request_id
            case Delta():
                answer.first_s = answer.first_s or time.monotonic() - begun_s
                answer.text += event.text
                sys.stdout.write(event.text)
                sys.stdout.flush()
            case Paused():
                _tell(f"[{event.reason}]")
            case ChoiceFinished():
                answer.finished = event
            case Summary():
                answer.summary = event
    answer.total_s = time.monotonic() - begun_s
    return answer


def show_summary(answer: Answer) -> None:
    """One line on standard error: tokens, times, energy, and who answered."""
    summary = answer.summary
    if summary is None:
        return
    usage = summary.usage
    decode_s = answer.total_s - answer.first_s
    rate = (usage.completion_tokens - 1) / decode_s if decode_s > 0 and usage.completion_tokens > 1 else 0.0
    cut = f", {usage.truncated_tokens} cut" if usage.truncated_tokens else ""
    cached = f" ({usage.cached_prompt_tokens} cached)" if usage.cached_prompt_tokens else ""
    why = f", ended by {answer.finished.reason.value}" if answer.finished is not None else ""
    attempts = f", {summary.attempts} attempts" if summary.attempts > 1 else ""
    _tell(
        f"[{usage.prompt_tokens} prompt tokens{cached}{cut}, {usage.completion_tokens} new{why}; "
        f"first after {1000 * answer.first_s:.0f} ms, then {rate:.0f}/s; "
        f"{usage.joules:.2f} J, {1000 * usage.grams_co2e:.2f} mgCO2e; "
        f"{summary.variant} at {summary.worker_id}{attempts}; {answer.request_id}]"
    )


def converse(
    client: SyncTriremeClient, model: str, sampling: Sampling, *, system: str, context_overflow: str = ""
) -> None:
    """Read turns from standard input until its end, and answer each.

    Raises:
        TriremeError: as the fleet said.
    """
    beginning = [{"role": "system", "content": system}] if system else []
    messages, session = list(beginning), secrets.token_hex(8)
    while (line := _read_turn()) is not None:
        if line.strip() == "/reset":
            messages, session = list(beginning), secrets.token_hex(8)
            continue
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        events = client.generate(
            model,
            messages,
            sampling,
            session_id=session,
            slo="interactive",
            context_overflow=context_overflow,
        )
        try:
            answer = print_answer(events)
        except KeyboardInterrupt:
            # An answer that was stopped is no part of the conversation.
            messages.pop()
            print()
            continue
        print()
        show_summary(answer)
        messages.append({"role": "assistant", "content": answer.text})


def _read_turn() -> str | None:
    if sys.stdin.isatty():
        try:
            return input("> ")
        except EOFError:
            print()
            return None
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _tell(line: str) -> None:
    styled = f"\033[2m{line}\033[0m" if sys.stderr.isatty() else line
    print(styled, file=sys.stderr, flush=True)
