{{/* What values.schema.json cannot say: combinations that would start and lose something, or never start. */}}
{{- define "freestep.checks" -}}
{{- $v := .Values -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" (include "freestep.fullname" .)) -}}
{{- fail "no Service can have the release's name: it has a dot, or begins with a digit; set fullnameOverride" -}}
{{- end -}}
{{- if and $v.redis.builtin.enabled $v.redis.url -}}
{{- fail "redis.builtin.enabled and redis.url are both set: choose the chart's Valkey or your Redis" -}}
{{- end -}}
{{- if and (gt (int $v.shards.replicas) 1) (not (include "freestep.hasRedis" .)) -}}
{{- fail "shards.replicas is above 1: several processes share a Redis; set redis.url, or redis.builtin.enabled" -}}
{{- end -}}
{{- if and (gt (int $v.shards.replicas) 1) (eq $v.checkpoints.kind "claim") -}}
{{- fail "shards.replicas is above 1: a pod takes over the shards of another from its checkpoints, which have to be where both see them; set checkpoints.kind to shared or object" -}}
{{- end -}}
{{- if and (not $v.persistence.enabled) (eq $v.checkpoints.kind "claim") -}}
{{- fail "persistence.enabled is false: checkpoints would go with the pod; set checkpoints.kind to shared or object" -}}
{{- end -}}
{{- if and (eq $v.shards.durability "journal") (not (or $v.persistence.enabled $v.persistence.journal.enabled)) -}}
{{- fail "shards.durability is journal: a journal has to come back with its pod; set persistence.enabled or persistence.journal.enabled" -}}
{{- end -}}
{{- if and (eq $v.checkpoints.kind "object") (not $v.checkpoints.object.url) -}}
{{- fail "checkpoints.kind is object: set checkpoints.object.url" -}}
{{- end -}}
{{- if and (ne $v.checkpoints.kind "object") $v.checkpoints.object.url -}}
{{- fail "checkpoints.object.url is set: checkpoints.kind has to be object" -}}
{{- end -}}
{{- if regexMatch "://[^/@]*:[^/@]+@|[?&]password=[^&]" $v.redis.url -}}
{{- fail "redis.url holds a password, which would stand in manifests: put it into a Secret that redis.passwordSecret names, and leave it out of the URL" -}}
{{- end -}}
{{- if and $v.redis.passwordSecret.name (not (include "freestep.hasRedis" .)) -}}
{{- fail "redis.passwordSecret is set: set redis.url or redis.builtin.enabled too" -}}
{{- end -}}
{{- if and $v.redis.caSecret.name (not (hasPrefix "rediss://" $v.redis.url)) -}}
{{- fail "redis.caSecret is set: redis.url has to begin with rediss://" -}}
{{- end -}}
{{- if and $v.tls.enabled (not $v.tls.secretName) (not $v.tls.certManager.issuerRef) -}}
{{- fail "tls.enabled is true: set tls.secretName, or tls.certManager.issuerRef" -}}
{{- end -}}
{{- if and (not $v.tls.enabled) (or $v.tls.secretName $v.tls.certManager.issuerRef) -}}
{{- fail "a certificate is named: set tls.enabled too" -}}
{{- end -}}
{{- range $kind, $client := dict "workers" $v.workers "evaluator" $v.evaluator -}}
{{- if and $client.enabled (not $client.image) -}}
{{- fail (printf "%s.enabled is true: set %s.image, an image of yours that has freestep" $kind $kind) -}}
{{- end -}}
{{- end -}}
{{- if and (or $v.workers.enabled $v.evaluator.enabled) (not $v.workers.run) -}}
{{- fail "workers.run is empty: name the run that workers train and evaluators watch" -}}
{{- end -}}
{{- with $v.workers.autoscaling -}}
{{- if .enabled -}}
{{- if not $v.workers.enabled -}}
{{- fail "workers.autoscaling.enabled is true: set workers.enabled too" -}}
{{- end -}}
{{- if ne $v.workers.kind "Deployment" -}}
{{- fail "workers.autoscaling.enabled is true: workers.kind has to be Deployment" -}}
{{- end -}}
{{- if not .prometheus -}}
{{- fail "workers.autoscaling.enabled is true: set workers.autoscaling.prometheus" -}}
{{- end -}}
{{- if gt (int .minReplicas) (int .maxReplicas) -}}
{{- fail "workers.autoscaling: minReplicas is above maxReplicas" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if ne (empty $v.reshard.run) (eq (int $v.reshard.shards) 0) -}}
{{- fail "reshard needs both run and shards" -}}
{{- end -}}
{{- if and $v.monitoring.serviceMonitor.enabled (not $v.monitoring.serviceMonitor.tokenSecret.name) -}}
{{- fail "monitoring.serviceMonitor.enabled is true: metrics need a token of scope read; keep one in a Secret that monitoring.serviceMonitor.tokenSecret names" -}}
{{- end -}}
{{- $set := list "admin-token-file" "advertise-url" "allowed-hosts" "ca-certs" "checkpoint-url" "data-dir" "device" "host" "insecure" "journal-dir" "oidc-audience" "oidc-ca-certs" "oidc-issuer" "oidc-jwks-url" "oidc-rules" "oidc-token-file" "port" "push-token-file" "redis-password-file" "redis-url" "redis-wait-seconds" "ssl-certfile" "ssl-keyfile" "trusted-proxies" -}}
{{- range $name, $_ := $v.shards.settings -}}
{{- if has $name $set -}}
{{- fail (printf "shards.settings.%s is set by the chart: see the other values" $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
