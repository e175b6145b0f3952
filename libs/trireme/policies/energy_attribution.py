"""Attribute a meter's energy to the requests that used it, and price engine time so that it adds up.

Pure: no clock, no I/O, no randomness. The power service keeps one `Account` per metered
device, calls `advance` once per window and publishes `Account.tariff`. Energies are whole
microjoules (`_uj`), so that the accounts sum to the meter exactly:

    metered_uj = billed_uj + idle_uj + unattributed_uj
    unattributed_uj = pending_uj + carry_uj + written_off_uj

docs/energy.md states the rule with an example and its limits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

UJ_PER_J = 1_000_000
MIN_ENGINE_S = 0.001
"""Less billed engine time than this in a window says nothing of what engine time costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """The rule's constants."""

    settle_s: float = 3.0
    """A window this old counts for the tariff: the workers' facts about it have come."""
    horizon_s: float = 15.0
    """A window this old is posted for good; later facts count for the oldest window still open."""
    active_windows: int = 16
    """Windows with billed engine time that set the price, and over which a carry is paid back."""
    correction_max: float = 2.0
    """A carry changes the price by at most this factor, up or down."""
    carry_half_life_s: float = 60.0
    """While no request is computed, half of the carry is given up in so many seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is known of a device before it is watched."""

    idle_w: float | None = None
    """Draw without load; None: to be learned from windows without engine time."""
    max_w: float | None = None
    """Largest draw under load; bounds what a short step may be billed. None: no bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeterWindow:
    """What the meter read between two readings."""

    start_s: float
    end_s: float
    energy_uj: int
    grams_co2e_per_kwh: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineUse:
    """What one worker says of one of its windows, which need not match the meter's."""

    end_s: float
    window_s: float
    busy_s: float
    """Engine seconds, also of steps that served no request (warm-up)."""
    billed_engine_s: float
    billed_uj: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One meter window with the engine use that fell into it so far."""

    start_s: float
    end_s: float
    energy_uj: int
    grams_co2e_per_kwh: float
    busy_s: float = 0.0
    billed_engine_s: float = 0.0
    billed_uj: int = 0

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """The ledger of one metered device; start with `opened(now_s)`."""

    since_s: float
    metered_uj: int = 0
    billed_uj: int = 0
    idle_uj: int = 0
    carry_uj: int = 0
    """Active energy of posted windows that is not billed yet; negative: billed too much."""
    written_off_uj: int = 0
    unmetered_billed_uj: int = 0
    """Billed for time that no meter watched; outside the sum."""
    unmetered_s: float = 0.0
    watched_since_s: float = 0.0
    """End of the newest hole; the ledger's start where there was none."""
    billed_engine_s: float = 0.0
    metered_g: float = 0.0
    billed_g: float = 0.0
    idle_g: float = 0.0
    idle_w: float | None = None
    """Learned draw without engine time."""
    tariff: float = 0.0
    """Joules per engine second."""
    windows: tuple[Window, ...] = ()
    """Not yet posted, oldest first; they never overlap."""
    recent: tuple[tuple[int, float], ...] = ()
    """(active microjoules, billed engine seconds) of the newest posted windows that had any."""

    @property
    def pending_uj(self) -> int:
        """Energy of windows not yet posted, less what was billed for them."""
        return sum(window.energy_uj - window.billed_uj for window in self.windows)

    @property
    def unattributed_uj(self) -> int:
        """What is neither billed nor idle."""
        return self.metered_uj - self.billed_uj - self.idle_uj


def opened(now_s: float) -> Account:
    """An empty ledger."""
    return Account(since_s=now_s, watched_since_s=now_s)


def advance(
    account: Account,
    *,
    now_s: float,
    meter: MeterWindow | None,
    uses: Sequence[EngineUse],
    limits: Limits,
    rule: Rule,
) -> Account:
    """Take in one meter window and the engine use that came in since; set the new tariff.

    `meter` is None where the reading failed. A meter window that starts later than the last
    one ended leaves a hole: time that no meter watched. Each use must be passed once.
    """
    if account.idle_w is None and limits.idle_w is not None:
        account = replace(account, idle_w=limits.idle_w)
    if meter is not None:
        account = _take_reading(account, meter)
    for use in uses:
        account = _take_use(account, use)
    account = _post(account, now_s=now_s, limits=limits, rule=rule)
    return replace(account, tariff=_tariff(account, now_s=now_s, limits=limits, rule=rule))


def active_uj(window: Window, *, idle_w: float, max_w: float | None) -> int:
    """The part of a window's energy that its requests answer for, 0..energy_uj.

    The idle draw counts for the share of time the engine was busy; all draw above it is the
    engine's, up to what the device can draw in that time; engine time that served no request
    takes its share with it.
    """
    if window.busy_s <= 0 or window.billed_engine_s < MIN_ENGINE_S or window.length_s <= 0:
        return 0
    busy = min(1.0, window.busy_s / window.length_s)
    base_uj = min(float(window.energy_uj), idle_w * window.length_s * UJ_PER_J)
    own_uj = window.energy_uj - base_uj
    if max_w is not None:
        own_uj = min(own_uj, max(0.0, max_w - idle_w) * busy * window.length_s * UJ_PER_J)
    served = min(1.0, window.billed_engine_s / window.busy_s)
    return min(window.energy_uj, math.floor((base_uj * busy + own_uj) * served))


def _take_reading(account: Account, meter: MeterWindow) -> Account:
    hole_s = max(0.0, meter.start_s - account.windows[-1].end_s) if account.windows else 0.0
    window = Window(
        start_s=meter.start_s,
        end_s=meter.end_s,
        energy_uj=meter.energy_uj,
        grams_co2e_per_kwh=meter.grams_co2e_per_kwh,
    )
    return replace(
        account,
        metered_uj=account.metered_uj + meter.energy_uj,
        metered_g=account.metered_g + _grams(meter.energy_uj, meter.grams_co2e_per_kwh),
        unmetered_s=account.unmetered_s + hole_s,
        watched_since_s=meter.start_s if hole_s > 0 else account.watched_since_s,
        windows=(*account.windows, window),
    )


def _take_use(account: Account, use: EngineUse) -> Account:
    """Spread a use over the windows it overlaps, in proportion; time in a hole is unmetered."""
    windows = account.windows
    start_s = use.end_s - use.window_s
    if not windows:
        return replace(account, unmetered_billed_uj=account.unmetered_billed_uj + use.billed_uj)
    shares_s = [max(0.0, min(use.end_s, w.end_s) - max(start_s, w.start_s)) for w in windows]
    # What came too late or runs ahead of the meter is still this device's: it goes to the edge.
    before_s = min(use.end_s, windows[0].start_s) - max(start_s, account.watched_since_s)
    shares_s[0] += max(0.0, before_s)
    shares_s[-1] += max(0.0, use.end_s - max(start_s, windows[-1].end_s))
    unmetered_s = use.window_s - sum(shares_s)
    if unmetered_s < 1e-6:
        unmetered_s = 0.0
    parts_uj = _split(use.billed_uj, [*shares_s, unmetered_s])
    updated = []
    billed_g = account.billed_g
    engine_s = account.billed_engine_s
    for window, share_s, part_uj in zip(windows, shares_s, parts_uj[:-1], strict=True):
        fraction = share_s / use.window_s
        billed_g += _grams(part_uj, window.grams_co2e_per_kwh)
        engine_s += use.billed_engine_s * fraction
        updated.append(
            replace(
                window,
                busy_s=window.busy_s + use.busy_s * fraction,
                billed_engine_s=window.billed_engine_s + use.billed_engine_s * fraction,
                billed_uj=window.billed_uj + part_uj,
            )
        )
    return replace(
        account,
        windows=tuple(updated),
        billed_uj=account.billed_uj + use.billed_uj - parts_uj[-1],
        unmetered_billed_uj=account.unmetered_billed_uj + parts_uj[-1],
        billed_engine_s=engine_s,
        billed_g=billed_g,
    )


def _post(account: Account, *, now_s: float, limits: Limits, rule: Rule) -> Account:
    """Move windows older than the horizon into the accounts; the newest window always stays open."""
    while len(account.windows) > 1 and account.windows[0].end_s <= now_s - rule.horizon_s:
        window = account.windows[0]
        account = _learn_idle(account, window)
        own_uj = active_uj(window, idle_w=_idle_w(account), max_w=limits.max_w)
        idle_uj = window.energy_uj - own_uj
        carry_uj = account.carry_uj + own_uj - window.billed_uj
        recent = account.recent
        if window.billed_engine_s >= MIN_ENGINE_S:
            recent = (*recent, (own_uj, window.billed_engine_s))[-rule.active_windows :]
        kept_uj = _kept_carry(carry_uj, window, recent, rule)
        account = replace(
            account,
            windows=account.windows[1:],
            recent=recent,
            idle_uj=account.idle_uj + idle_uj,
            idle_g=account.idle_g + _grams(idle_uj, window.grams_co2e_per_kwh),
            carry_uj=kept_uj,
            written_off_uj=account.written_off_uj + carry_uj - kept_uj,
        )
    return account


def _kept_carry(carry_uj: int, window: Window, recent: Sequence[tuple[int, float]], rule: Rule) -> int:
    """Old debts end: the carry halves while nobody computes, and never exceeds the recent active energy."""
    if window.busy_s <= 0:
        carry_uj = math.trunc(carry_uj * 0.5 ** (window.length_s / rule.carry_half_life_s))
    bound_uj = sum(own_uj for own_uj, _ in recent)
    return max(-bound_uj, min(bound_uj, carry_uj))


def _learn_idle(account: Account, window: Window) -> Account:
    """Follow the draw of windows without engine time: quickly down, slowly up."""
    if window.busy_s > 0 or window.length_s <= 0:
        return account
    draw_w = window.energy_uj / UJ_PER_J / window.length_s
    if account.idle_w is None:
        return replace(account, idle_w=draw_w)
    gain = 0.5 if draw_w < account.idle_w else 0.05
    return replace(account, idle_w=account.idle_w + gain * (draw_w - account.idle_w))


def _idle_w(account: Account) -> float:
    """The learned idle draw, or the lowest draw of the open windows without engine time, or 0."""
    if account.idle_w is not None:
        return account.idle_w
    quiet = [w for w in account.windows if w.busy_s <= 0 and w.length_s > 0]
    return min((w.energy_uj / UJ_PER_J / w.length_s for w in quiet), default=0.0)


def _tariff(account: Account, *, now_s: float, limits: Limits, rule: Rule) -> float:
    idle_w = _idle_w(account)
    carry_uj = account.carry_uj
    recent = list(account.recent)
    for window in account.windows:
        if window.end_s > now_s - rule.settle_s:
            break
        own_uj = active_uj(window, idle_w=idle_w, max_w=limits.max_w)
        carry_uj += own_uj - window.billed_uj
        if window.billed_engine_s >= MIN_ENGINE_S:
            recent.append((own_uj, window.billed_engine_s))
    recent = recent[-rule.active_windows :]
    own_total_uj = sum(own_uj for own_uj, _ in recent)
    engine_s = sum(seconds for _, seconds in recent)
    if engine_s <= 0:
        return account.tariff or _first_tariff(account, limits)
    if own_total_uj <= 0:
        return 0.0
    factor = (own_total_uj + carry_uj) / own_total_uj
    factor = max(1.0 / rule.correction_max, min(rule.correction_max, factor))
    return factor * own_total_uj / UJ_PER_J / engine_s


def _first_tariff(account: Account, limits: Limits) -> float:
    """Before any engine time was seen: half way between idle and full draw, else the draw now."""
    if limits.idle_w is not None and limits.max_w is not None:
        return (limits.idle_w + limits.max_w) / 2
    newest = account.windows[-1] if account.windows else None
    if newest is None or newest.length_s <= 0:
        return 0.0
    return newest.energy_uj / UJ_PER_J / newest.length_s


def _split(total: int, weights: Sequence[float]) -> list[int]:
    """Whole parts in proportion to `weights` that sum to `total` exactly."""
    scale = sum(weights)
    last = max((index for index, weight in enumerate(weights) if weight > 0), default=len(weights) - 1)
    parts, done, seen = [], 0, 0.0
    for index, weight in enumerate(weights):
        seen += weight
        upto = round(total * (seen / scale)) if index < last else total
        parts.append(upto - done)
        done = upto
    return parts


def _grams(energy_uj: int, grams_co2e_per_kwh: float) -> float:
    return energy_uj / 3.6e12 * grams_co2e_per_kwh
