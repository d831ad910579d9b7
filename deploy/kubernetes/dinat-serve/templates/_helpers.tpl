{{/* Name of every object in this release. */}}
{{- define "dinat.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 53 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 53 | trimSuffix "-" }}{{ end }}
{{- end }}

{{/* Labels that select the pods; they must not change between versions. */}}
{{- define "dinat.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "dinat.labels" -}}
{{ include "dinat.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "dinat.image" -}}
{{ .Values.image.repository }}{{ if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ end }}
{{- end }}

{{- define "dinat.resources" -}}
{{- $resources := deepCopy .Values.resources }}
{{- if gt (int .Values.gpus) 0 }}
{{- $_ := set $resources "limits" (merge (dict "nvidia.com/gpu" (int .Values.gpus)) ($resources.limits | default dict)) }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{/* A setting as text. Helm reads numbers as floating point, and would write 2097152 as 2.097152e+06. */}}
{{- define "dinat.setting" -}}
{{- if and (kindIs "float64" .) (eq . (floor .)) }}{{ printf "%.0f" . }}{{ else }}{{ toString . }}{{ end }}
{{- end }}

{{/* Environment variables must not take the probes away. */}}
{{- define "dinat.check" -}}
{{- if and (or .Values.apiKeys.secret .Values.settings.API_KEYS_FILE) (hasKey .Values.settings "KEYLESS") }}
{{- if not (has "health" (splitList "," (.Values.settings.KEYLESS | toString | nospace))) }}
{{- fail "settings.KEYLESS must contain health: without it the probes get 401, and Kubernetes restarts every pod" }}
{{- end }}
{{- end }}
{{- end }}

{{/*
The container. Arguments: `container`, its name; `model`, the checkpoint; `name`, the model's name for clients; `storage`, the URI
from which KServe downloads the checkpoint.
*/}}
{{- define "dinat.container" -}}
{{- include "dinat.check" .root -}}
name: {{ .container }}
image: {{ include "dinat.image" .root }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
ports:
  - { name: http, containerPort: 8000, protocol: TCP }
env:
  - { name: DINAT_MODEL, value: {{ .model | quote }} }
  {{- with .name }}
  - { name: DINAT_NAME, value: {{ . | quote }} }
  {{- end }}
  {{- with .storage }}
  - { name: STORAGE_URI, value: {{ . | quote }} }
  {{- end }}
  {{- with .root.Values.revision }}
  - { name: DINAT_REVISION, value: {{ . | quote }} }
  {{- end }}
  - { name: DINAT_DEVICE, value: {{ gt (int .root.Values.gpus) 0 | ternary "cuda" "cpu" }} }
  - { name: DINAT_LOG_FORMAT, value: json }
  - { name: DINAT_LAME_DUCK_SECONDS, value: {{ .root.Values.stop.lameDuckSeconds | quote }} }
  - { name: DINAT_DRAIN_SECONDS, value: {{ .root.Values.stop.drainSeconds | quote }} }
  {{- range $name, $value := .root.Values.settings }}
  - { name: DINAT_{{ $name }}, value: {{ include "dinat.setting" $value | quote }} }
  {{- end }}
  {{- if .root.Values.apiKeys.secret }}
  - { name: DINAT_API_KEYS_FILE, value: {{ printf "/run/secrets/dinat/%s" .root.Values.apiKeys.key | quote }} }
  {{- end }}
  {{- with .root.Values.huggingFace }}{{ if .secret }}
  - name: HF_TOKEN
    valueFrom: { secretKeyRef: { name: {{ .secret }}, key: {{ .key }} } }
  {{- end }}{{ end }}
  {{- with .root.Values.env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .root.Values.envFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
resources:
  {{- include "dinat.resources" .root | nindent 2 }}
securityContext:
  {{- toYaml .root.Values.securityContext | nindent 2 }}
# The port is open seconds after the start. Loading the model may take minutes; until then /health/live is 200, /health/ready 503.
startupProbe:
  httpGet: { path: /health/live, port: http }
  periodSeconds: 2
  failureThreshold: 60
livenessProbe:
  httpGet: { path: /health/live, port: http }
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
readinessProbe:
  httpGet: { path: /health/ready, port: http }
  periodSeconds: 2
  timeoutSeconds: 5
  failureThreshold: 1
volumeMounts:
  - { name: cache, mountPath: /cache }
  - { name: tmp, mountPath: /tmp }
  {{- if .root.Values.models.claim }}
  - { name: models, mountPath: /models, readOnly: true }
  {{- end }}
  {{- if .root.Values.apiKeys.secret }}
  - { name: api-keys, mountPath: /run/secrets/dinat, readOnly: true }
  {{- end }}
  {{- with .root.Values.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "dinat.volumes" -}}
- name: cache
  {{- if eq .Values.cache.kind "claim" }}
  persistentVolumeClaim: { claimName: {{ .Values.cache.claim | default (include "dinat.name" .) }} }
  {{- else }}
  emptyDir: { sizeLimit: {{ .Values.cache.size }} }
  {{- end }}
- name: tmp
  emptyDir: { sizeLimit: 1Gi }
{{- if .Values.models.claim }}
- name: models
  persistentVolumeClaim: { claimName: {{ .Values.models.claim }}, readOnly: true }
{{- end }}
{{- with .Values.apiKeys }}{{ if .secret }}
- name: api-keys
  secret: { secretName: {{ .secret }}, items: [{ key: {{ .key }}, path: {{ .key }} }] }
{{- end }}{{ end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Scheduling fields that the Deployment and the InferenceService have in common. */}}
{{- define "dinat.placement" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - { name: {{ . }} }
  {{- end }}
{{- end }}
{{- with .Values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/*
How pods are replaced. Two pods on different nodes cannot mount a ReadWriteOnce volume, so that a new pod beside the old one might
never start.
*/}}
{{- define "dinat.strategy" -}}
{{- if .Values.updateStrategy }}
{{- toYaml .Values.updateStrategy }}
{{- else if and (eq .Values.cache.kind "claim") (not .Values.cache.claim) (ne .Values.cache.accessMode "ReadWriteMany") -}}
type: Recreate
{{- else -}}
type: RollingUpdate
rollingUpdate: { maxUnavailable: 0, maxSurge: 1 }
{{- end }}
{{- end }}

{{/* Seconds from SIGTERM to SIGKILL: the lame duck period, the drain timeout and a margin of 10. */}}
{{- define "dinat.grace" -}}
{{ add (ceil .Values.stop.lameDuckSeconds) (ceil .Values.stop.drainSeconds) 10 }}
{{- end }}
