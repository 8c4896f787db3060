{{/* Names, labels and checks. A name leaves room for suffixes and for what a StatefulSet adds to it. */}}

{{- define "foretoken.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "foretoken.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "foretoken.name" . -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{- define "foretoken.selector" -}}
app.kubernetes.io/name: {{ include "foretoken.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "foretoken.labels" -}}
{{ include "foretoken.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: foretoken
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "foretoken.serviceAccount" -}}
{{- default (ternary (include "foretoken.fullname" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name -}}
{{- end }}

{{- define "foretoken.imageReference" -}}
{{- if .image.digest -}}
{{- printf "%s@%s" .image.repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" .image.repository (default .tag .image.tag) -}}
{{- end -}}
{{- end }}

{{- define "foretoken.port" -}}
8000
{{- end }}

{{- define "foretoken.home" -}}
/var/lib/foretoken
{{- end }}

{{- define "foretoken.workload" -}}
{{- ternary "StatefulSet" "Deployment" (eq .Values.cache.kind "perPod") -}}
{{- end }}

{{- define "foretoken.tokenSecret" -}}
{{- default (printf "%s-hub" (include "foretoken.fullname" .)) .Values.huggingFace.existingSecret -}}
{{- end }}

{{- define "foretoken.redisSecret" -}}
{{- default (printf "%s-redis" (include "foretoken.fullname" .)) .Values.redis.existingSecret -}}
{{- end }}

{{- define "foretoken.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "foretoken.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* What a schema cannot say: values that contradict each other. */}}
{{- define "foretoken.check" -}}
{{- with .Values -}}
{{- if and (eq .cache.kind "existingClaim") (not .cache.existingClaim) -}}
{{- fail "cache.existingClaim: name the PersistentVolumeClaim, or choose another cache.kind" -}}
{{- end -}}
{{- if and .cache.existingClaim (ne .cache.kind "existingClaim") -}}
{{- fail "cache.existingClaim: is used with cache.kind existingClaim only" -}}
{{- end -}}
{{- if and .huggingFace.token .huggingFace.existingSecret -}}
{{- fail "huggingFace.token and huggingFace.existingSecret: give one of them" -}}
{{- end -}}
{{- if and .model.revision (not .model.name) -}}
{{- fail "model.revision: needs model.name, a Hugging Face id" -}}
{{- end -}}
{{- if gt (int .autoscaling.minReplicas) (int .autoscaling.maxReplicas) -}}
{{- fail "autoscaling.minReplicas: must not be larger than autoscaling.maxReplicas" -}}
{{- end -}}
{{- if and .ingress.enabled (not .ingress.hosts) -}}
{{- fail "ingress.hosts: name at least one host" -}}
{{- end -}}
{{- range .server.extraEnv -}}
{{- if hasPrefix "FORETOKEN_" .name -}}
{{- fail (printf "server.extraEnv: %s would hide what the chart sets; use settings" .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}
