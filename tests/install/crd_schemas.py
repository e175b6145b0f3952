"""JSON schemas of the custom resources that the chart makes: the fields it uses, and no others.

Written after the definitions of keda.sh/v1alpha1 and monitoring.coreos.com/v1.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}


def _object(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {**required, **(optional or {})},
        "required": list(required),
    }


def _resource(spec: Schema) -> Schema:
    metadata = _object({"name": TEXT, "labels": TEXTS})
    return _object({"apiVersion": TEXT, "kind": TEXT, "metadata": metadata, "spec": spec})


def _list(item: Schema) -> Schema:
    return {"type": "array", "items": item, "minItems": 1}


CRD_SCHEMAS: dict[str, Schema] = {
    "keda.sh/v1alpha1/ScaledObject": _resource(
        _object(
            {
                "scaleTargetRef": _object({"name": TEXT}),
                "minReplicaCount": COUNT,
                "maxReplicaCount": COUNT,
                "triggers": _list(
                    # A trigger's metadata are texts, numbers and booleans among them.
                    _object({"type": TEXT, "metadata": TEXTS}, {"authenticationRef": _object({"name": TEXT})})
                ),
            },
            {"cooldownPeriod": COUNT},
        )
    ),
    "keda.sh/v1alpha1/TriggerAuthentication": _resource(
        _object({"secretTargetRef": _list(_object({"parameter": TEXT, "name": TEXT, "key": TEXT}))})
    ),
    "monitoring.coreos.com/v1/ServiceMonitor": _resource(
        _object(
            {
                "selector": _object({"matchLabels": TEXTS}),
                "endpoints": _list(
                    _object(
                        {"port": TEXT, "path": TEXT, "interval": TEXT},
                        {
                            "scheme": {"enum": ["http", "https"]},
                            "tlsConfig": _object({}, {"insecureSkipVerify": {"type": "boolean"}}),
                        },
                    )
                ),
            },
            {"podTargetLabels": _list(TEXT)},
        )
    ),
    "monitoring.coreos.com/v1/PrometheusRule": _resource(
        _object(
            {
                "groups": _list(
                    _object(
                        {
                            "name": TEXT,
                            "rules": _list(
                                _object(
                                    {"alert": TEXT, "expr": TEXT, "labels": TEXTS, "annotations": TEXTS},
                                    {"for": TEXT},
                                )
                            ),
                        }
                    )
                )
            }
        )
    ),
}
