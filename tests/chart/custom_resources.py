"""Schemas of the resources that are not Kubernetes' own, of the fields that this repository uses.

They follow the definitions that KEDA, the Prometheus operator, cert-manager and Kubeflow's trainer publish. A field
that is not here is refused, also where the project has it: whoever writes one adds it. What is an object here and
nothing more is a template of pods, which Kubernetes' own schemas are for.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

__all__ = ["SCHEMAS"]


def _object(*required: str, **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


_TEXT: Schema = {"type": "string", "minLength": 1}
_NUMBER: Schema = {"type": "integer", "minimum": 0}
_TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
_SELECTOR = _object(matchLabels=_TEXTS)
_KEY = _object("name", "key", name=_TEXT, key=_TEXT)
_DURATION: Schema = {"type": "string", "pattern": r"^(0|(([0-9]+)(ms|s|m|h|d))+)$"}
_ENV = _list({"type": "object", "required": ["name"]})


def _resource(version: str, kind: str, spec: Schema) -> Schema:
    return _object(
        "apiVersion",
        "kind",
        "metadata",
        "spec",
        apiVersion={"const": version},
        kind={"const": kind},
        metadata=_object("name", name=_TEXT, namespace=_TEXT, labels=_TEXTS, annotations=_TEXTS),
        spec=spec,
    )


_SCALING = _object(
    stabilizationWindowSeconds={"type": "integer", "minimum": 0, "maximum": 3600},
    policies=_list(
        _object(
            "type",
            "value",
            "periodSeconds",
            type={"enum": ["Pods", "Percent"]},
            value={"type": "integer", "minimum": 1},
            periodSeconds={"type": "integer", "minimum": 1, "maximum": 1800},
        )
    ),
)
_POD: Schema = {"type": "object"}

SCHEMAS: dict[str, Schema] = {
    "ScaledObject": _resource(
        "keda.sh/v1alpha1",
        "ScaledObject",
        _object(
            "scaleTargetRef",
            "triggers",
            scaleTargetRef=_object("name", name=_TEXT),
            minReplicaCount=_NUMBER,
            maxReplicaCount=_NUMBER,
            pollingInterval=_NUMBER,
            advanced=_object(
                horizontalPodAutoscalerConfig=_object(behavior=_object(scaleUp=_SCALING, scaleDown=_SCALING))
            ),
            triggers=_list(
                _object(
                    "type",
                    "metadata",
                    type=_TEXT,
                    # Every value is a text, numbers and truths too.
                    metadata=_TEXTS,
                    metricType={"enum": ["AverageValue", "Value", "Utilization"]},
                    authenticationRef=_object("name", name=_TEXT),
                )
            ),
        ),
    ),
    "ServiceMonitor": _resource(
        "monitoring.coreos.com/v1",
        "ServiceMonitor",
        _object(
            "endpoints",
            "selector",
            jobLabel=_TEXT,
            selector=_SELECTOR,
            endpoints=_list(
                _object(
                    port=_TEXT,
                    path=_TEXT,
                    interval=_DURATION,
                    scheme={"enum": ["http", "https"]},
                    authorization=_object(type=_TEXT, credentials=_KEY),
                    tlsConfig=_object(serverName=_TEXT, ca=_object(secret=_KEY)),
                )
            ),
        ),
    ),
    "PrometheusRule": _resource(
        "monitoring.coreos.com/v1",
        "PrometheusRule",
        _object(
            groups=_list(
                _object(
                    "name",
                    name=_TEXT,
                    rules=_list(
                        {
                            **_object("alert", "expr", alert=_TEXT, expr=_TEXT, labels=_TEXTS, annotations=_TEXTS),
                            "properties": {
                                "alert": _TEXT,
                                "expr": _TEXT,
                                "for": _DURATION,
                                "labels": _TEXTS,
                                "annotations": _TEXTS,
                            },
                        }
                    ),
                )
            )
        ),
    ),
    "Certificate": _resource(
        "cert-manager.io/v1",
        "Certificate",
        _object(
            "issuerRef",
            "secretName",
            secretName=_TEXT,
            issuerRef=_object("name", name=_TEXT, kind=_TEXT, group=_TEXT),
            dnsNames=_list({"type": "string", "pattern": r"^(\*\.)?[a-z0-9-]+(\.[a-z0-9-]+)*$"}),
            ipAddresses=_list(_TEXT),
            privateKey=_object(algorithm={"enum": ["RSA", "ECDSA", "Ed25519"]}, size=_NUMBER),
            usages=_list({"enum": ["digital signature", "key encipherment", "server auth", "client auth"]}),
        ),
    ),
    "ClusterTrainingRuntime": _resource(
        "trainer.kubeflow.org/v1alpha1",
        "ClusterTrainingRuntime",
        _object(
            "template",
            mlPolicy=_object(numNodes={"type": "integer", "minimum": 1}, torch={"type": "object", "maxProperties": 0}),
            template=_object(
                "spec",
                spec=_object(
                    "replicatedJobs",
                    replicatedJobs=_list(
                        _object(
                            "name",
                            "template",
                            name=_TEXT,
                            template=_object(
                                "spec", metadata=_object(labels=_TEXTS), spec=_object("template", template=_POD)
                            ),
                        )
                    ),
                ),
            ),
        ),
    ),
    "TrainJob": _resource(
        "trainer.kubeflow.org/v1alpha1",
        "TrainJob",
        _object(
            "runtimeRef",
            runtimeRef=_object("name", name=_TEXT, kind=_TEXT, apiGroup=_TEXT),
            trainer=_object(
                image=_TEXT,
                command=_list(_TEXT),
                args=_list(_TEXT),
                env=_ENV,
                numNodes={"type": "integer", "minimum": 1},
                resourcesPerNode=_object(requests={"type": "object"}, limits={"type": "object"}),
            ),
        ),
    ),
}
