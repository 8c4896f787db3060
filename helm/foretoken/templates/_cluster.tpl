{{/* Of the processes of a cluster: how many workers, their caches, and what each process is told by its environment. */}}

{{- define "foretoken.numWorkers" -}}
{{- $number := 0 -}}
{{- range .root.Values.workerGroups -}}
{{- if eq .role $.role -}}
{{- $number = add $number .replicas -}}
{{- end -}}
{{- end -}}
{{- $number -}}
{{- end }}

{{/* What the expert workers compute on; "cpu cuda" where they differ. */}}
{{- define "foretoken.expertDevice" -}}
{{- $devices := list -}}
{{- range .Values.workerGroups -}}
{{- if eq .role "expert" -}}
{{- $devices = append $devices (ternary "cuda" "cpu" (gt (default 0 .gpus | int) 0)) -}}
{{- end -}}
{{- end -}}
{{- $devices | uniq | sortAlpha | join " " -}}
{{- end }}

{{/* What a group says of its cache comes before what is said of all. */}}
{{- define "foretoken.groupCache" -}}
{{- toYaml (merge (deepCopy (default dict .group.cache)) .root.Values.cache) -}}
{{- end }}

{{/* The cache of what a Deployment runs: it has no volume for each pod. */}}
{{- define "foretoken.deploymentCache" -}}
{{- $cache := deepCopy .Values.cache -}}
{{- if eq $cache.kind "perPod" -}}
{{- $_ := set $cache "kind" "ephemeral" -}}
{{- end -}}
{{- toYaml $cache -}}
{{- end }}

{{/* Whether a controller's loop went round in the last 20 s; it beats more than once a second. */}}
{{- define "foretoken.beats" -}}
exec:
  command: [sh, -c, 'test -n "$(find /tmp/controller.pulse -newermt "-20 seconds")"']
{{- end }}

{{- define "foretoken.clusterVariables" -}}
- name: FORETOKEN_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ include "foretoken.clusterSecret" . }}
      key: {{ ternary .Values.clusterToken.existingSecretKey "token" (not (empty .Values.clusterToken.existingSecret)) }}
{{- if .Values.redis.enabled }}
- name: REDIS_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ include "foretoken.redisSecret" . }}
      key: {{ ternary .Values.redis.existingSecretKey "password" (not (empty .Values.redis.existingSecret)) }}
- name: FORETOKEN_STORE
  value: redis://{{ include "foretoken.clusterName" . }}:$(REDIS_PASSWORD)@{{ include "foretoken.fullname" . }}-redis:6379/0
{{- else }}
- name: FORETOKEN_STORE
  valueFrom:
    secretKeyRef:
      name: {{ .Values.store.existingSecret }}
      key: {{ .Values.store.existingSecretKey }}
{{- end }}
{{- end }}

{{/* Pods of these components of this release, as a NetworkPolicy selects them: `root`, `components`. */}}
{{- define "foretoken.podsOf" -}}
podSelector:
  matchLabels:
    app.kubernetes.io/name: {{ include "foretoken.name" .root }}
    app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
  matchExpressions:
    - key: app.kubernetes.io/component
      operator: In
      values: [{{ join ", " .components }}]
{{- end }}

{{/* Ways out that every policy with restrictEgress has; between the processes of a cluster, those that they go. */}}
{{- define "foretoken.egress" -}}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
    - {port: 443, protocol: TCP}
{{- if eq .Values.mode "cluster" }}
- ports:
    - {port: {{ include "foretoken.port" . }}, protocol: TCP}
  to:
    - {{- include "foretoken.podsOf" (dict "root" . "components" (list "worker")) | nindent 6 }}
{{- if .Values.redis.enabled }}
- ports:
    - {port: 6379, protocol: TCP}
  to:
    - {{- include "foretoken.podsOf" (dict "root" . "components" (list "redis")) | nindent 6 }}
{{- end }}
{{- end }}
{{- with .Values.networkPolicy.egress }}
{{ toYaml . }}
{{- end }}
{{- end }}
