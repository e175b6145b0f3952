"""The gateway's settings, from variables named TRIREME_GATEWAY_<FIELD>."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trireme.errors import InvalidConfiguration
from trireme.gateway.limits import Limits
from trireme.runtime.tls import Certificates, TlsFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One gateway process."""

    fleet: Path
    """The fleet file; names the models and their checkpoints."""
    redis_url: str = "redis://127.0.0.1:6379/0"
    bus_prefix: str = "trireme"
    """Prefix of this fleet's keys in Redis."""
    node: str = "local"
    grpc_listen: str = "127.0.0.1:9000"
    http_listen: str = "127.0.0.1:8000"
    log_level: str = "info"

    max_waiting: int = 4096
    """Requests that may wait for a worker in the whole fleet; more are refused."""
    max_inflight: int = 2048
    """Requests that this gateway holds at once; more are refused."""
    max_connections: int = 4096
    """HTTP connections that this gateway holds at once; more are refused."""
    retry_after_s: float = 1.0
    """The soonest that a refused client is told to come back."""
    brown_out_answer_tokens: int = 512
    """While the fleet is behind: max_tokens of requests that leave it open."""
    admission_s: float = 5.0
    """How long Redis may take to make a request durable."""
    max_request_s: float = 3600.0
    """A request that is not done by then is stopped."""
    flush_interval_s: float = 0.02
    """Least time between two deliveries to one client, except its first token and its end.
    An engine slower than this is not delayed; a faster one has its tokens merged."""
    max_deliveries_per_s: int = 2000
    """Above so many deliveries a second over all clients, more tokens are merged into one."""
    ping_s: float = 15.0
    """An HTTP stream that has nothing to say for so long sends a comment."""
    stall_s: float = 120.0
    """A client that takes nothing for so long is taken for gone."""
    body_s: float = 60.0
    """How long a client may take to send a body."""
    idle_s: float = 75.0
    """An HTTP connection without a complete request for so long is closed."""
    silence_s: float = 1.0
    """A request without news for so long is compared with its record."""
    usage_wait_s: float = 1.0
    """After a stop string: how long to wait for the worker's account of what was used."""
    kept_timelines: int = 256
    """Ended requests whose phases this gateway can tell of."""
    operator_listen: str = ""
    """Where the page for operators is; empty: nowhere."""
    drain_s: float = 30.0
    """How long streams may go on after SIGTERM; then their clients resume elsewhere."""
    keys: Path | None = None
    """The keys file: who may call, as which tenant. It is read again when it changes."""
    allow_anonymous: bool = False
    """Without keys: answer anyone, also from other machines. On loopback this needs no saying."""
    tls_cert: Path | None = None
    """PEM certificate that HTTP and gRPC clients are shown, with its chain; None: plaintext. Followed."""
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    """Authorities that clients' own certificates must come from; None: clients need none."""
    metrics_listen: str = ""
    """Where /livez, /readyz and /metrics are shown in plaintext and without a key; empty: nowhere."""
    open_metrics: bool = False
    """Show /metrics without a key: where Prometheus has none, and clients do not reach the port."""
    audit_log: str = ""
    """Where calls are written down: a file, `-` for standard output, or empty for nowhere."""
    audit_max_bytes: int = 64 * 2**20
    """A file of the audit log has at most so many bytes."""
    audit_files: int = 8
    """Files of the audit log, with those that came before."""
    trust_tenant_header: bool = False
    """Believe `x-trireme-tenant`; only behind a proxy that sets it, and without keys."""

    response_ttl_s: float = 86400.0
    """How long a stored response (/v1/responses) is kept after its end."""
    max_responses: int = 1000
    """Stored responses of one tenant; the oldest that ended makes room."""
    max_response_bytes: int = 64 * 2**20
    """Of one tenant's stored responses together; the oldest that ended makes room."""
    max_background: int = 64
    """Background responses of one tenant that run at once; more are refused."""
    max_driven: int = 256
    """Background responses that this gateway drives at once; more wait for another, or for room."""

    file_ttl_s: float = 604800.0
    """How long a file, and a batch after its end, is kept."""
    max_files: int = 1000
    """Files of one tenant; more are refused."""
    max_files_bytes: int = 128 * 2**20
    """Of one tenant's files together; more are refused."""
    max_file_bytes: int = 16 * 2**20
    """Of one uploaded file. It is kept in Redis, and held in memory by the gateway that drives its batch."""
    max_fleet_files: int = 20_000
    """Files of all tenants, and batches that are kept of all tenants; more are refused."""
    max_fleet_files_bytes: int = 2**31
    """Of all tenants' files together; more are refused. What batches write is kept, and counted."""
    max_batches: int = 16
    """Batches of one tenant that run at once; more are refused."""
    max_fleet_batches: int = 128
    """Batches of all tenants that run at once; more are refused."""
    max_batch_lines: int = 50_000
    max_batch_output_bytes: int = 64 * 2**20
    """Of a batch's results together; lines that come later fail."""
    batch_window: int = 32
    """Lines of one batch that wait or run in the fleet at once."""
    max_driven_batches: int = 4
    """Batches that this gateway drives at once; more wait for another, or for room."""

    max_body_bytes: int = 8 * 2**20
    max_header_bytes: int = 16 * 2**10
    max_prompt_tokens: int = 131072
    max_answer_tokens: int = 32768
    max_choices: int = 16
    max_stop_strings: int = 16
    max_stop_characters: int = 256
    max_stop_token_ids: int = 64
    max_logit_bias: int = 1024
    max_logprobs: int = 20
    max_prompt_logprobs: int = 65536
    max_messages: int = 2048
    max_prompts: int = 64
    max_embeddings: int = 2048
    max_labels: int = 64

    def certificates(self) -> Certificates | None:
        """What clients are shown; None: plaintext.

        Raises:
            InvalidConfiguration: the files are not right.
        """
        if self.tls_cert is None and self.tls_key is None and self.tls_client_ca is None:
            return None
        if self.tls_cert is None or self.tls_key is None:
            raise InvalidConfiguration(
                "TLS needs both TRIREME_GATEWAY_TLS_CERT and TRIREME_GATEWAY_TLS_KEY", param="tls_cert"
            )
        return Certificates(TlsFiles(cert=self.tls_cert, key=self.tls_key, ca=self.tls_client_ca))

    def limits(self) -> Limits:
        """What one request may ask for."""
        return Limits(
            max_prompt_tokens=self.max_prompt_tokens,
            max_answer_tokens=self.max_answer_tokens,
            max_choices=self.max_choices,
            max_stop_strings=self.max_stop_strings,
            max_stop_characters=self.max_stop_characters,
            max_stop_token_ids=self.max_stop_token_ids,
            max_logit_bias=self.max_logit_bias,
            max_logprobs=self.max_logprobs,
            max_prompt_logprobs=self.max_prompt_logprobs,
            max_messages=self.max_messages,
            max_prompts=self.max_prompts,
            max_embeddings=self.max_embeddings,
            max_labels=self.max_labels,
            trimmed_answer_tokens=self.brown_out_answer_tokens,
        )
