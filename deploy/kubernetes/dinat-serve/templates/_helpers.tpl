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

{{- define "dinat.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: { type: RuntimeDefault }
{{- end }}

{{- define "dinat.resources" -}}
requests:
  {{- toYaml .Values.resources.requests | nindent 2 }}
limits:
  {{- toYaml .Values.resources.limits | nindent 2 }}
  {{- if gt (int .Values.gpus) 0 }}
  nvidia.com/gpu: {{ .Values.gpus }}
  {{- end }}
{{- end }}

{{/*
The container. Arguments: `container`, its name; `model`, the checkpoint; `name`, the model's name for clients; `storage`, the URI
from which KServe downloads the checkpoint.
*/}}
{{- define "dinat.container" -}}
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
  - { name: DINAT_{{ $name }}, value: {{ $value | toString | quote }} }
  {{- end }}
  {{- with .root.Values.apiKeys }}{{ if .secret }}
  - name: DINAT_API_KEYS
    valueFrom: { secretKeyRef: { name: {{ .secret }}, key: {{ .key }} } }
  {{- end }}{{ end }}
  {{- with .root.Values.huggingFace }}{{ if .secret }}
  - name: HF_TOKEN
    valueFrom: { secretKeyRef: { name: {{ .secret }}, key: {{ .key }} } }
  {{- end }}{{ end }}
resources:
  {{- include "dinat.resources" .root | nindent 2 }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: { drop: [ALL] }
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

{{/* Seconds from SIGTERM to SIGKILL: the lame duck period, the drain timeout and a margin of 10. */}}
{{- define "dinat.grace" -}}
{{ add (ceil .Values.stop.lameDuckSeconds) (ceil .Values.stop.drainSeconds) 10 }}
{{- end }}
