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
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
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

{{- define "foretoken.image" -}}
{{- include "foretoken.imageReference" (dict "image" .Values.image "tag" .Chart.AppVersion) -}}
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

{{/* What clients reach: the whole servers, or a cluster's gateways. */}}
{{- define "foretoken.front" -}}
{{- ternary "gateway" "server" (eq .Values.mode "cluster") -}}
{{- end }}

{{- define "foretoken.frontName" -}}
{{- include "foretoken.fullname" . -}}{{- ternary "-gateway" "" (eq .Values.mode "cluster") -}}
{{- end }}

{{- define "foretoken.frontKind" -}}
{{- ternary "StatefulSet" "Deployment" (and (eq .Values.mode "server") (eq .Values.cache.kind "perPod")) -}}
{{- end }}

{{/* What a cluster calls itself in its store: the prefix of its keys, and its user there. */}}
{{- define "foretoken.clusterName" -}}
{{- default (include "foretoken.fullname" .) .Values.store.namespace -}}
{{- end }}

{{- define "foretoken.groupName" -}}
{{- printf "%s-%s-%s" (include "foretoken.fullname" .root) .group.role .group.name -}}
{{- end }}

{{- define "foretoken.groupSelector" -}}
{{ include "foretoken.selector" (dict "root" .root "component" "worker") }}
foretoken/role: {{ .group.role }}
foretoken/group: {{ .group.name }}
{{- end }}

{{- define "foretoken.tokenSecret" -}}
{{- default (printf "%s-hub" (include "foretoken.fullname" .)) .Values.huggingFace.existingSecret -}}
{{- end }}

{{- define "foretoken.keysSecret" -}}
{{- default (printf "%s-keys" (include "foretoken.fullname" .)) .Values.apiKeys.existingSecret -}}
{{- end }}

{{- define "foretoken.redisSecret" -}}
{{- default (printf "%s-redis" (include "foretoken.fullname" .)) .Values.redis.existingSecret -}}
{{- end }}

{{- define "foretoken.clusterSecret" -}}
{{- default (printf "%s-cluster" (include "foretoken.fullname" .)) .Values.clusterToken.existingSecret -}}
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
