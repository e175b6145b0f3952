{{- define "trireme.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* Names built on it have at most 63 characters; what is cut keeps a hash, so that no two releases meet. */}}
{{- define "trireme.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- $own := eq .Release.Name $name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) }}
{{- $full := default $own .Values.fullnameOverride }}
{{- if gt (len $full) 32 }}
{{- printf "%s-%s" (trunc 23 $full | trimSuffix "-") (sha256sum $full | trunc 8) }}
{{- else }}
{{- $full }}
{{- end }}
{{- end }}

{{- define "trireme.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "trireme.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* Immutable: what Deployments and Services select. Takes root, component. */}}
{{- define "trireme.selectorLabels" -}}
app.kubernetes.io/name: {{ include "trireme.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* Takes root, component. */}}
{{- define "trireme.labels" -}}
{{ include "trireme.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: trireme
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* All pods of one service, whatever their component. Takes root, service. */}}
{{- define "trireme.serviceLabels" -}}
app.kubernetes.io/name: {{ include "trireme.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
trireme/service: {{ .service }}
{{- end }}

{{/* Takes root, image (overrides). */}}
{{- define "trireme.image" -}}
{{- $image := mustMergeOverwrite (deepCopy .root.Values.image) (default dict .image) }}
{{- $name := empty $image.registry | ternary $image.repository (printf "%s/%s" $image.registry $image.repository) }}
{{- if $image.digest }}
{{- printf "%s@%s" $name $image.digest }}
{{- else }}
{{- printf "%s:%s" $name (default .root.Chart.AppVersion $image.tag) }}
{{- end }}
{{- end }}

{{- define "trireme.pullPolicy" -}}
{{- (mustMergeOverwrite (deepCopy .root.Values.image) (default dict .image)).pullPolicy }}
{{- end }}

{{- define "trireme.busPrefix" -}}
{{- default (printf "%s.%s" .Release.Namespace (include "trireme.fullname" .)) .Values.busPrefix }}
{{- end }}

{{- define "trireme.redisAddress" -}}
{{- printf "%s-redis.%s.svc.%s:6379" (include "trireme.fullname" .) .Release.Namespace .Values.clusterDomain }}
{{- end }}

{{/* The Secret with the bundled Redis' password. */}}
{{- define "trireme.redisSecret" -}}
{{- default (printf "%s-redis" (include "trireme.fullname" .)) .Values.redis.bundled.existingSecret }}
{{- end }}

{{/* One worker group with its defaults, as JSON. Takes root, group. */}}
{{- define "trireme.workerGroup" -}}
{{- $defaults := deepCopy .root.Values.workerDefaults }}
{{- $merged := dict }}
{{- range $key, $value := $defaults }}
{{- $own := get $.group $key }}
{{- if not (hasKey $.group $key) }}
{{- $_ := set $merged $key $value }}
{{- else if and (kindIs "map" $value) (kindIs "map" $own) (has $key (list "engine" "gpu" "autoscaling" "rollingUpdate" "podDisruptionBudget")) }}
{{- $section := $value }}
{{- range $inner, $innerValue := $own }}
{{- if and (kindIs "map" $innerValue) (kindIs "map" (get $section $inner)) }}
{{- range $leaf, $leafValue := $innerValue }}{{- $_ := set (get $section $inner) $leaf $leafValue }}{{- end }}
{{- else }}
{{- $_ := set $section $inner $innerValue }}
{{- end }}
{{- end }}
{{- $_ := set $merged $key $section }}
{{- else }}
{{- $_ := set $merged $key $own }}
{{- end }}
{{- end }}
{{- $_ := set $merged "name" .group.name }}
{{- $merged | toJson }}
{{- end }}

{{/* Who sets a group's number of workers: helm, placement, hpa or keda. Takes root, group. */}}
{{- define "trireme.scaledBy" -}}
{{- if ne .group.autoscaling.mode "none" }}
{{- .group.autoscaling.mode }}
{{- else }}
{{- .root.Values.placement.enabled | ternary "placement" "helm" }}
{{- end }}
{{- end }}

{{- define "trireme.placementServiceAccountName" -}}
{{- $own := printf "%s-placement" (include "trireme.fullname" .) }}
{{- with .Values.placement.serviceAccount }}
{{- if .create }}
{{- default $own .name }}
{{- else }}
{{- required "placement.serviceAccount.name names the account, where none is created" .name }}
{{- end }}
{{- end }}
{{- end }}
