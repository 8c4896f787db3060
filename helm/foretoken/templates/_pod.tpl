{{/* The settings file: what the chart sets itself, and `settings`. */}}
{{- define "foretoken.config" -}}
{{- $own := dict "host" "0.0.0.0" "port" (include "foretoken.port" . | int) "home" (include "foretoken.home" .) -}}
{{- range $setting, $value := dict "model" .Values.model.name "revision" .Values.model.revision "served_model_name" .Values.model.servedName -}}
{{- if $value -}}
{{- $_ := set $own $setting $value -}}
{{- end -}}
{{- end -}}
{{- if eq .Values.mode "cluster" -}}
{{- $_ := set $own "cluster_name" (include "foretoken.clusterName" .) -}}
{{- end -}}
{{- toYaml (merge $own .Values.settings) -}}
{{- end }}

{{/* Of every pod: `root`, and its `user`. */}}
{{- define "foretoken.podFrame" -}}
serviceAccountName: {{ include "foretoken.serviceAccount" .root }}
automountServiceAccountToken: false
# a Service's variables, such as FORETOKEN_PORT=tcp://…, would be taken for settings
enableServiceLinks: false
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  {{- include "foretoken.podSecurity" .user | nindent 2 }}
{{- end }}

{{/* Labels and annotations of a pod that runs Foretoken: `root`, its `labels` as text, and `pods`, its values. */}}
{{- define "foretoken.podMetadata" -}}
labels:
  {{- .labels | nindent 2 }}
  {{- with .pods.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  foretoken/config: {{ include "foretoken.config" .root | sha256sum }}
  {{- with .pods.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{/* Where a model comes from and is kept, for every container that runs Foretoken. */}}
{{- define "foretoken.variables" -}}
- name: HOME
  value: {{ include "foretoken.home" . }}
- name: HF_HOME
  value: {{ include "foretoken.home" . }}/huggingface
{{- if or .Values.huggingFace.token .Values.huggingFace.existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ include "foretoken.tokenSecret" . }}
      key: {{ ternary .Values.huggingFace.existingSecretKey "token" (not (empty .Values.huggingFace.existingSecret)) }}
{{- end }}
{{- with .Values.huggingFace.endpoint }}
- name: HF_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- if .Values.huggingFace.offline }}
- name: HF_HUB_OFFLINE
  value: "1"
{{- end }}
{{- end }}

{{/* The keys of what serves HTTP. */}}
{{- define "foretoken.keyVariables" -}}
{{- $keys := .Values.apiKeys }}
{{- $theirs := not (empty $keys.existingSecret) }}
- name: FORETOKEN_API_KEY
  valueFrom:
    secretKeyRef:
      name: {{ include "foretoken.keysSecret" . }}
      key: {{ ternary $keys.existingSecretKey "keys" $theirs }}
{{- if or (not $theirs) $keys.existingSecretAdminKey }}
- name: FORETOKEN_ADMIN_API_KEY
  valueFrom:
    secretKeyRef:
      name: {{ include "foretoken.keysSecret" . }}
      key: {{ ternary $keys.existingSecretAdminKey "admin" $theirs }}
{{- end }}
{{- end }}

{{/* The probes of what serves HTTP: `pods`, its values. */}}
{{- define "foretoken.httpProbes" -}}
# nothing is answered while weights are fetched: this probe waits for it, the others begin after it
startupProbe:
  httpGet: {path: /health/startup, port: http}
  periodSeconds: 5
  timeoutSeconds: 2
  failureThreshold: {{ div (add .startupSeconds 4) 5 }}
# the process answers, also while it drains and while its worker is started again
livenessProbe:
  httpGet: {path: /health/live, port: http}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /health/ready, port: http}
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: 2
{{- if .preStopSeconds }}
lifecycle:
  preStop:
    exec:
      command: [sleep, {{ .preStopSeconds | quote }}]
{{- end }}
{{- end }}

{{- define "foretoken.resources" -}}
requests:
  {{- toYaml .resources.requests | nindent 2 }}
limits:
  {{- toYaml .resources.limits | nindent 2 }}
  {{- with .gpus }}
  nvidia.com/gpu: {{ . }}
  {{- end }}
{{- end }}

{{- define "foretoken.mounts" -}}
- name: config
  mountPath: /etc/foretoken
  readOnly: true
- name: cache
  mountPath: {{ include "foretoken.home" . }}
- name: tmp
  mountPath: /tmp
{{- end }}

{{/* `root`, `tmpSize`, and `cache` as in values.yaml; one of kind perPod is the StatefulSet's to make. */}}
{{- define "foretoken.volumes" -}}
- name: config
  configMap:
    name: {{ include "foretoken.fullname" .root }}
- name: tmp
  emptyDir:
    sizeLimit: {{ .tmpSize }}
{{- if eq .cache.kind "ephemeral" }}
- name: cache
  emptyDir:
    sizeLimit: {{ .cache.size }}
{{- else if eq .cache.kind "existingClaim" }}
- name: cache
  persistentVolumeClaim:
    claimName: {{ .cache.existingClaim }}
{{- end }}
{{- end }}

{{/* The claim of each pod: `cache`, and the `selector` of its StatefulSet as text. */}}
{{- define "foretoken.cacheClaim" -}}
- metadata:
    name: cache
    labels:
      {{- .selector | nindent 6 }}
  spec:
    accessModes: [ReadWriteOnce]
    {{- with .cache.storageClass }}
    storageClassName: {{ . }}
    {{- end }}
    resources:
      requests:
        storage: {{ .cache.size }}
{{- end }}

{{/* Where pods go: `pods`, their values, and their `selector` as text. */}}
{{- define "foretoken.placement" -}}
{{- with .pods.hostMaxSkew }}
topologySpreadConstraints:
  - maxSkew: {{ . }}
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- $.selector | nindent 8 }}
{{- end }}
{{- with .pods.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pods.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pods.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pods.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .pods.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end }}
