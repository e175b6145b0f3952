"""The gRPC face of the power service: decode, look up, encode. No rule lives here."""

from __future__ import annotations

from trireme.errors import InvalidRequest
from trireme.policies.energy_attribution import UJ_PER_J
from trireme.policies.energy_billing import per_1k_tokens
from trireme.power.ledger import DeviceBook, Totals
from trireme.power.metering import Metering
from trireme.power.request_energy import FinishedRequests
from trireme.runtime.serving import Context
from trireme.wire.power.v1 import power_pb2 as pb
from trireme.wire.power.v1.power_pb2_grpc import PowerServicer as Base


class PowerServicer(Base):
    """Answers from the window loop's present state."""

    def __init__(self, *, metering: Metering, finished: FinishedRequests) -> None:
        self._metering = metering
        self._finished = finished

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:
        metering = self._metering
        carbon = metering.intensity
        return pb.GetStatusResponse(
            node=metering.node,
            meters=[self._meter(device) for device in metering.meters],
            carbon=pb.CarbonStatus(
                grams_co2e_per_kwh=carbon.grams_co2e_per_kwh, source=carbon.source, age_s=carbon.age_s
            ),
            at_unix_s=metering.last_window_unix_s,
        )

    async def GetLedger(self, request: pb.GetLedgerRequest, context: Context) -> pb.GetLedgerResponse:
        metering = self._metering
        return pb.GetLedgerResponse(
            node=metering.node,
            devices=[
                device_ledger(device, book, now_s=metering.now_s())
                for device, book in sorted(metering.ledger.books.items())
            ],
            duplicate_facts=metering.ledger.duplicate_facts,
            refused_facts=metering.ledger.refused_facts,
        )

    async def GetRequestEnergy(
        self, request: pb.GetRequestEnergyRequest, context: Context
    ) -> pb.GetRequestEnergyResponse:
        if not request.request_id:
            raise InvalidRequest("request_id is empty", param="request_id")
        finished = self._finished.get(request.request_id)
        usage = finished.usage
        tokens = usage.prompt_tokens + usage.completion_tokens
        return pb.GetRequestEnergyResponse(
            request_id=finished.request_id,
            variant=finished.variant,
            worker_id=finished.worker_id,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            engine_s=usage.engine_s,
            joules=usage.joules,
            grams_co2e=usage.grams_co2e,
            joules_per_1k_tokens=per_1k_tokens(usage.joules, tokens),
            grams_co2e_per_1k_tokens=per_1k_tokens(usage.grams_co2e, tokens),
            finished_unix_s=finished.finished_unix_s,
        )

    def _meter(self, device: str) -> pb.MeterStatus:
        metering = self._metering
        meter, account = metering.meters[device], metering.ledger.books[device].account
        return pb.MeterStatus(
            meter=meter.name,
            device=device,
            description=meter.description,
            draw_w=metering.states[device].draw_w,
            idle_w=account.idle_w,
            max_w=meter.limits.max_w,
            joules_per_engine_s=account.tariff,
            age_s=metering.age_s(device),
        )


def device_ledger(device: str, book: DeviceBook, *, now_s: float) -> pb.DeviceLedger:
    """One device's book on the wire."""
    account = book.account
    return pb.DeviceLedger(
        meter=book.meter,
        device=device,
        since_unix_s=account.since_s,
        total=_accounts(book.totals),
        last_hour=_accounts(book.last_hour(now_s)),
        pending_joules=account.pending_uj / UJ_PER_J,
        carry_joules=account.carry_uj / UJ_PER_J,
        written_off_joules=account.written_off_uj / UJ_PER_J,
        unmetered_billed_joules=account.unmetered_billed_uj / UJ_PER_J,
        unmetered_s=account.unmetered_s,
    )


def _accounts(totals: Totals) -> pb.Accounts:
    return pb.Accounts(
        metered_joules=totals.metered_uj / UJ_PER_J,
        billed_joules=totals.billed_uj / UJ_PER_J,
        idle_joules=totals.idle_uj / UJ_PER_J,
        unattributed_joules=(totals.metered_uj - totals.billed_uj - totals.idle_uj) / UJ_PER_J,
        metered_grams_co2e=totals.metered_g,
        billed_grams_co2e=totals.billed_g,
        idle_grams_co2e=totals.idle_g,
        billed_engine_s=totals.billed_engine_s,
    )
