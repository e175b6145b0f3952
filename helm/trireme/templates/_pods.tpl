{{/* Labels and annotations of a pod. Takes root, component, service, options. */}}
{{- define "trireme.podMetadata" -}}
{{- /* How many workers a group has concerns placement alone. */}}
{{- $fleet := include "trireme.fleet" .root }}
{{- if ne .service "placement" }}{{ $fleet = regexReplaceAll "(?m)^ +replicas: [0-9]+$" $fleet "" }}{{ end }}
annotations:
  checksum/fleet: {{ $fleet | sha256sum }}
  {{- with mustMergeOverwrite (deepCopy .root.Values.podAnnotations) (default dict .options.podAnnotations) }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
labels:
  {{- with mustMergeOverwrite (deepCopy .root.Values.podLabels) (default dict .options.podLabels) }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- include "trireme.labels" . | nindent 2 }}
  trireme/service: {{ .service }}
{{- end }}

{{/* What all pods have beside containers and volumes. Takes root, options, and the serviceAccount of a pod that
     calls the cluster's API. */}}
{{- define "trireme.podOptions" -}}
serviceAccountName: {{ .serviceAccount | default (include "trireme.serviceAccountName" .root) }}
automountServiceAccountToken: {{ hasKey . "serviceAccount" }}
enableServiceLinks: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext: {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- range $key := list "priorityClassName" "runtimeClassName" "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
{{- with get $.options $key }}
{{ $key }}: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{/* Image and security of a container. Takes root, image. */}}
{{- define "trireme.container" -}}
image: {{ include "trireme.image" . | quote }}
imagePullPolicy: {{ include "trireme.pullPolicy" . }}
securityContext: {{- toYaml .root.Values.securityContext | nindent 2 }}
{{- end }}

{{/* The environment of a service. Takes root, service, values (settings by name), options. */}}
{{- define "trireme.env" -}}
{{- $prefix := printf "TRIREME_%s_" (upper .service) }}
- name: HOME
  value: /tmp
- name: XDG_CACHE_HOME
  value: /tmp/cache
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: NODE_NAME
  valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
{{- with .root.Values.tracing.endpoint }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- if include "trireme.tlsSecret" . }}
- {name: TRIREME_TLS_CERT, value: /etc/trireme-tls/tls.crt}
- {name: TRIREME_TLS_KEY, value: /etc/trireme-tls/tls.key}
- {name: TRIREME_TLS_CA, value: /etc/trireme-tls/ca.crt}
- {name: TRIREME_TLS_NAME, value: {{ .root.Values.tls.name | quote }}}
{{- end }}
- name: {{ $prefix }}REDIS_URL
  {{- if eq .root.Values.redis.mode "bundled" }}
  value: redis://{{ include "trireme.redisAddress" .root }}/0?password_file=/etc/trireme-redis/password
  {{- else }}
  valueFrom:
    secretKeyRef:
      name: {{ required "redis.external.existingSecret names the Secret with the URL" .root.Values.redis.external.existingSecret }}
      key: {{ .root.Values.redis.external.urlKey }}
  {{- end }}
- name: {{ $prefix }}BUS_PREFIX
  value: {{ include "trireme.busPrefix" .root | quote }}
- name: {{ $prefix }}LOG_LEVEL
  value: {{ .root.Values.logLevel | quote }}
{{- range $name, $value := mustMergeOverwrite (deepCopy (default dict .options.settings)) .values }}
- name: {{ $prefix }}{{ upper $name }}
  value: {{ kindIs "slice" $value | ternary (join "," $value) (toString $value) | quote }}
{{- end }}
{{- with .options.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* HTTP probes: startup is long, readiness is progress, liveness is the process.
     Takes port, startPath, startSeconds; scheme. */}}
{{- define "trireme.probes" -}}
startupProbe:
  httpGet: {path: {{ .startPath }}, port: {{ .port }}{{ with .scheme }}, scheme: {{ . }}{{ end }}}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: {{ div .startSeconds 2 }}
readinessProbe:
  httpGet: {path: /readyz, port: {{ .port }}{{ with .scheme }}, scheme: {{ . }}{{ end }}}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 2
livenessProbe:
  httpGet: {path: /livez, port: {{ .port }}{{ with .scheme }}, scheme: {{ . }}{{ end }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end }}

{{/* The Secret with a service's certificate within the fleet, or nothing. Takes root, service. */}}
{{- define "trireme.tlsSecret" -}}
{{- $secret := default .root.Values.tls.secret (get .root.Values.tls.secrets .service) }}
{{- if and .root.Values.tls.secrets (not $secret) }}
{{- fail (printf "tls.secrets has no Secret for %s: name one there, or in tls.secret one for all others" .service) }}
{{- end }}
{{- $secret }}
{{- end }}

{{/* Takes root, service. */}}
{{- define "trireme.mounts" -}}
- name: fleet
  mountPath: /etc/trireme
  readOnly: true
{{- if include "trireme.tlsSecret" . }}
- name: tls-{{ .service }}
  mountPath: /etc/trireme-tls
  readOnly: true
{{- end }}
{{- if eq .root.Values.redis.mode "bundled" }}
- name: redis-password
  mountPath: /etc/trireme-redis
  readOnly: true
{{- end }}
- name: tmp
  mountPath: /tmp
{{- end }}

{{/* Takes root, service. */}}
{{- define "trireme.tlsVolume" -}}
{{- with include "trireme.tlsSecret" . }}
- name: tls-{{ $.service }}
  secret:
    secretName: {{ . }}
{{- end }}
{{- end }}

{{/* Takes root, service. */}}
{{- define "trireme.volumes" -}}
- name: fleet
  configMap:
    name: {{ include "trireme.fullname" .root }}-fleet
{{- include "trireme.tlsVolume" . }}
{{- if eq .root.Values.redis.mode "bundled" }}
- name: redis-password
  secret:
    secretName: {{ include "trireme.redisSecret" .root }}
    items: [{key: password, path: password}]
{{- end }}
- name: tmp
  emptyDir: {}
{{- end }}

{{- define "trireme.checkpointMounts" -}}
{{- if ne .Values.checkpoints.source "image" }}
- name: checkpoints
  mountPath: {{ .Values.checkpoints.mountPath }}
  readOnly: true
{{- end }}
{{- end }}

{{- define "trireme.checkpointVolumes" -}}
{{- with .Values.checkpoints }}
{{- if eq .source "claim" }}
- name: checkpoints
  persistentVolumeClaim:
    claimName: {{ required "checkpoints.claimName names the claim" .claimName }}
    readOnly: true
{{- else if eq .source "hostPath" }}
- name: checkpoints
  hostPath:
    path: {{ required "checkpoints.hostPath names the directory" .hostPath }}
    type: Directory
{{- else if eq .source "imageVolume" }}
- name: checkpoints
  image:
    reference: {{ required "checkpoints.imageVolume.reference names the image" .imageVolume.reference }}
    pullPolicy: {{ .imageVolume.pullPolicy }}
{{- end }}
{{- end }}
{{- end }}
