{{- define "freestep.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- include "freestep.short" (dict "name" .Release.Name "length" 40) -}}
{{- else -}}
{{- printf "%s-%s" (include "freestep.short" (dict "name" .Release.Name "length" 30)) .Chart.Name -}}
{{- end -}}
{{- end -}}

{{/* name, of which two stay two; length: what of it may be left. */}}
{{- define "freestep.short" -}}
{{- if gt (len .name) .length -}}
{{- printf "%s-%s" (.name | trunc (int (sub .length 9)) | trimSuffix "-") (sha256sum .name | trunc 8) -}}
{{- else -}}
{{- .name -}}
{{- end -}}
{{- end -}}

{{- define "freestep.selector" -}}
app.kubernetes.io/name: freestep
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "freestep.labels" -}}
{{ include "freestep.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* Labels of pods, by their component: none that another version of the chart changes, by which pods that have not
changed would be made anew, and a Job that has ended would be another. */}}
{{- define "freestep.podLabels" -}}
{{ include "freestep.selector" .root }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "freestep.tag" -}}
{{- .Values.image.tag | default .Chart.AppVersion -}}
{{- end -}}

{{- define "freestep.image" -}}
{{- .Values.image.repository }}:{{ include "freestep.tag" . -}}
{{- end -}}

{{- define "freestep.cudaImage" -}}
{{- with .Values.shards.gpu.image -}}
{{- .repository | default $.Values.image.repository }}:{{ .tag | default (printf "%s-cuda" (include "freestep.tag" $)) -}}
{{- end -}}
{{- end -}}

{{/* Where a pod may be, as far as its values say it. */}}
{{- define "freestep.scheduling" -}}
{{- $given := dict -}}
{{- range $name, $value := pick . "affinity" "nodeSelector" "priorityClassName" "tolerations" -}}
{{- if $value -}}
{{- $_ := set $given $name $value -}}
{{- end -}}
{{- end -}}
{{- with $given -}}
{{- toYaml . -}}
{{- end -}}
{{- end -}}

{{/* Where a pod may be that runs the service's image beside the shards, and needs none of their GPUs. */}}
{{- define "freestep.besideShards" -}}
{{- include "freestep.scheduling" (pick .Values.shards "nodeSelector" "tolerations") -}}
{{- end -}}

{{- define "freestep.scheme" -}}
{{- if .Values.tls.enabled }}https{{ else }}http{{ end -}}
{{- end -}}

{{- define "freestep.url" -}}
{{ include "freestep.scheme" . }}://{{ include "freestep.fullname" . }}.{{ .Release.Namespace }}.svc:{{ .Values.service.port }}
{{- end -}}

{{- define "freestep.tokens" -}}
{{- .Values.tokens.existingSecret | default (printf "%s-tokens" (include "freestep.fullname" .)) -}}
{{- end -}}

{{- define "freestep.redisSecret" -}}
{{- .Values.redis.passwordSecret.name | default (printf "%s-redis" (include "freestep.fullname" .)) -}}
{{- end -}}

{{/* Not by a subPath: another password has to reach pods that run. */}}
{{- define "freestep.redisPasswordVolume" -}}
- name: redis-password
  secret:
    secretName: {{ include "freestep.redisSecret" . }}
    defaultMode: 0440
    items:
      - key: {{ .Values.redis.passwordSecret.key }}
        path: password
{{- end -}}

{{- define "freestep.tlsSecret" -}}
{{- .Values.tls.secretName | default (printf "%s-tls" (include "freestep.fullname" .)) -}}
{{- end -}}

{{- define "freestep.hasRedis" -}}
{{- if or .Values.redis.builtin.enabled .Values.redis.url }}yes{{ end -}}
{{- end -}}

{{- define "freestep.hasRedisPassword" -}}
{{- if or .Values.redis.builtin.enabled .Values.redis.passwordSecret.name }}yes{{ end -}}
{{- end -}}

{{- define "freestep.redisUrl" -}}
{{- if .Values.redis.builtin.enabled -}}
redis://{{ include "freestep.fullname" . }}-redis.{{ .Release.Namespace }}.svc:6379/0
{{- else -}}
{{- $url := .Values.redis.url -}}
{{- $url -}}
{{- if .Values.redis.caSecret.name }}{{ contains "?" $url | ternary "&" "?" }}ssl_ca_certs=/etc/freestep/redis/ca.crt{{ end -}}
{{- end -}}
{{- end -}}

{{/* What every pod has: no privilege, and none of the variables that Kubernetes makes of Services, among which
FREESTEP_PORT would be that of a Service named freestep. */}}
{{- define "freestep.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .user | default 10001 }}
  runAsGroup: {{ .user | default 10001 }}
  fsGroup: {{ .user | default 10001 }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- end -}}

{{- define "freestep.container" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Variables of a client: where the service is, and who asks. */}}
{{- define "freestep.clientEnv" -}}
- name: FREESTEP_URL
  value: {{ include "freestep.url" . }}
- name: FREESTEP_TOKEN_FILE
  value: /var/run/freestep/token
{{- if .Values.tls.enabled }}
- name: FREESTEP_CA_CERTS
  value: /etc/freestep/tls/ca.crt
{{- end }}
{{- end -}}

{{- define "freestep.clientMounts" -}}
- name: tmp
  mountPath: /tmp
- name: token
  mountPath: /var/run/freestep
  readOnly: true
{{- if .Values.tls.enabled }}
- name: tls
  mountPath: /etc/freestep/tls
  readOnly: true
{{- end }}
{{- end -}}

{{/* root; key: the token in the Secret; account: whether the pod's own account may be used instead. */}}
{{- define "freestep.clientVolumes" -}}
- name: tmp
  emptyDir: {}
- name: token
{{- if and .account .root.Values.oidc.enabled }}
  projected:
    defaultMode: 0440
    sources:
      - serviceAccountToken:
          path: token
          audience: {{ .root.Values.oidc.audience }}
          expirationSeconds: 3600
{{- else }}
  secret:
    secretName: {{ include "freestep.tokens" .root }}
    defaultMode: 0440
    items:
      - key: {{ .key }}
        path: token
{{- end }}
{{- if .root.Values.tls.enabled }}
- name: tls
  secret:
    secretName: {{ include "freestep.tlsSecret" .root }}
    defaultMode: 0440
    items:
      - key: ca.crt
        path: ca.crt
{{- end }}
{{- end -}}

{{/* A token of the pod's account for the API server, and the CA of that. */}}
{{- define "freestep.accountVolume" -}}
- name: account
  projected:
    defaultMode: 0440
    sources:
      - serviceAccountToken:
          path: token
          expirationSeconds: 3600
      - configMap:
          name: kube-root-ca.crt
          items:
            - key: ca.crt
              path: ca.crt
{{- end -}}

{{/* root; component; values: those of workers or of the evaluator; container: its name; restart: the pod's policy, if it is
not the usual one; seconds: from SIGTERM to SIGKILL. */}}
{{- define "freestep.clientPod" -}}
{{- $root := .root -}}
{{- with .values -}}
{{- $resources := deepCopy .resources -}}
{{- if .gpu.count -}}
{{- $_ := set $resources "limits" (merge (dict .gpu.resource (.gpu.count | toString)) ($resources.limits | default dict)) -}}
{{- end -}}
metadata:
  labels:
    {{- include "freestep.podLabels" (dict "root" $root "component" $.component) | nindent 4 }}
  {{- with .podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "freestep.pod" (dict "root" $root "user" .runAsUser) | nindent 2 }}
  serviceAccountName: {{ include "freestep.fullname" $root }}-workers
  terminationGracePeriodSeconds: {{ $.seconds }}
  {{- with $.restart }}
  restartPolicy: {{ . }}
  {{- end }}
  {{- with include "freestep.scheduling" (dict "nodeSelector" .nodeSelector "tolerations" $.tolerations "affinity" .affinity) }}{{ . | nindent 2 }}{{ end }}
  containers:
    - name: {{ $.container }}
      image: {{ .image }}
      imagePullPolicy: {{ .imagePullPolicy }}
      {{- with .command }}
      command:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .args }}
      args:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      env:
        {{- include "freestep.clientEnv" $root | nindent 8 }}
        - name: FREESTEP_RUN
          value: {{ $root.Values.workers.run | quote }}
        - name: FREESTEP_RETRY_SECONDS
          value: {{ $root.Values.workers.retrySeconds | quote }}
        {{- if eq $.component "workers" }}
        # An eviction, a drain or fewer replicas end the lease at once, and give its units back.
        - name: FREESTEP_LEAVE_ON_SIGTERM
          value: "1"
        {{- end }}
        {{- with .extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with .envFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      resources:
        {{- toYaml $resources | nindent 8 }}
      securityContext:
        {{- include "freestep.container" $root | replace "readOnlyRootFilesystem: true" (printf "readOnlyRootFilesystem: %t" .readOnlyRootFilesystem) | nindent 8 }}
      volumeMounts:
        {{- include "freestep.clientMounts" $root | nindent 8 }}
        {{- if .sharedMemory }}
        - name: shm
          mountPath: /dev/shm
        {{- end }}
        {{- with .volumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    {{- include "freestep.clientVolumes" (dict "root" $root "key" "push-token" "account" true) | nindent 4 }}
    {{- with .sharedMemory }}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ . }}
    {{- end }}
    {{- with .volumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}
{{- end -}}

{{- define "freestep.claim" -}}
accessModes: [{{ .mode | default "ReadWriteOnce" }}]
{{- with .storageClass }}
storageClassName: {{ . | quote }}
{{- end }}
resources:
  requests:
    storage: {{ .size }}
{{- end -}}

{{/* root; name: of a file of the chart, which a copy of it has lost if links were left out. */}}
{{- define "freestep.file" -}}
{{- required (printf "files/%s is empty: it is a link, which a package of the chart (`helm package`) has the target of" .name) (.root.Files.Get (printf "files/%s" .name)) -}}
{{- end -}}

{{/* Annotations of what exists before the release does; the weight says in which order. */}}
{{- define "freestep.hook" -}}
annotations:
  helm.sh/hook: pre-install,pre-upgrade
  helm.sh/hook-weight: {{ . | quote }}
  helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end -}}
