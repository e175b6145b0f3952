{{/* The store of a worker's pod: a sidecar, so it starts before the worker and ends after it. No readiness:
     a worker without its store computes what the store would have had. */}}
{{- define "trireme.kvstore" -}}
name: kvstore
restartPolicy: Always
{{ include "trireme.container" (dict "root" . "image" .Values.kvstore.image) }}
command: [python, -m, trireme.kvstore]
env:
  {{- include "trireme.env" (dict "root" . "service" "kvstore" "options" .Values.kvstore "values" (dict
    "fleet" "/etc/trireme/fleet.yaml" "node" "$(POD_NAME)" "flush_s" .Values.kvstore.flushSeconds "ephemeral" true
    "directory" "/var/lib/trireme/kv" "arena_directory" "/dev/shm"
    "listen" "$(POD_IP):7040" "metrics_listen" "$(POD_IP):7041")) | nindent 2 }}
ports:
  - {name: kv-grpc, containerPort: 7040}
  - {name: kv-metrics, containerPort: 7041}
livenessProbe:
  httpGet: {path: /livez, port: kv-metrics}
  initialDelaySeconds: 30
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- $memory := printf "%dMi" (add .Values.kvstore.dramMib (include "trireme.arenaIndexMib" . | int) .Values.kvstore.resources.memoryMib) }}
resources:
  requests: {cpu: {{ .Values.kvstore.resources.cpu }}, memory: {{ $memory }}}
  limits: {memory: {{ $memory }}}
volumeMounts:
  {{- include "trireme.mounts" (dict "root" . "service" "kvstore") | nindent 2 }}
  - {name: arena, mountPath: /dev/shm}
  - {name: ssd, mountPath: /var/lib/trireme}
{{- end }}

{{/* What the arena's residency index takes, at most: it grows with both tiers. */}}
{{- define "trireme.arenaIndexMib" -}}
{{- add (div (add .Values.kvstore.dramMib .Values.kvstore.ssdMib) 512) 16 }}
{{- end }}

{{- define "trireme.kvstoreVolumes" -}}
{{- with include "trireme.tlsVolume" (dict "root" . "service" "kvstore") | trim }}
{{ . }}
{{- end }}
- name: arena
  emptyDir:
    medium: Memory
    sizeLimit: {{ add .Values.kvstore.dramMib (include "trireme.arenaIndexMib" . | int) }}Mi
{{- $ssdMib := add (div (mul .Values.kvstore.ssdMib 11) 10) 64 }}
- name: ssd
  {{- if .Values.kvstore.storageClassName }}
  ephemeral:
    volumeClaimTemplate:
      spec:
        accessModes: [ReadWriteOnce]
        storageClassName: {{ .Values.kvstore.storageClassName }}
        resources:
          requests:
            storage: {{ $ssdMib }}Mi
  {{- else }}
  emptyDir:
    sizeLimit: {{ $ssdMib }}Mi
  {{- end }}
{{- end }}

{{/* A worker's resources with its GPU. Takes the group. */}}
{{- define "trireme.workerResources" -}}
{{- $resources := deepCopy .resources }}
{{- if eq .gpu.mode "devicePlugin" }}
{{- $limits := default dict $resources.limits }}
{{- $_ := set $limits .gpu.resourceName .gpu.count }}
{{- $_ := set $resources "limits" $limits }}
{{- else if eq .gpu.mode "dra" }}
{{- $_ := set $resources "claims" (list (dict "name" "gpu")) }}
{{- end }}
{{- toYaml $resources }}
{{- end }}
