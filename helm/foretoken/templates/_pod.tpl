{{/* The settings file: what the chart sets itself, and `settings`. */}}
{{- define "foretoken.config" -}}
{{- $own := dict "host" "0.0.0.0" "port" (include "foretoken.port" . | int) "home" (include "foretoken.home" .) -}}
{{- range $setting, $value := dict "model" .Values.model.name "revision" .Values.model.revision "served_model_name" .Values.model.servedName -}}
{{- if $value -}}
{{- $_ := set $own $setting $value -}}
{{- end -}}
{{- end -}}
{{- toYaml (merge $own .Values.settings) -}}
{{- end }}

{{/* The pod of one server, for a Deployment and a StatefulSet alike. */}}
{{- define "foretoken.pod" -}}
{{- $server := .Values.server -}}
{{- $of := dict "root" . "component" "server" -}}
metadata:
  labels:
    {{- include "foretoken.labels" $of | nindent 4 }}
    {{- with $server.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    foretoken/config: {{ include "foretoken.config" . | sha256sum }}
    {{- with $server.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "foretoken.serviceAccount" . }}
  automountServiceAccountToken: false
  # a Service's variables, such as FORETOKEN_PORT=tcp://…, would be taken for settings
  enableServiceLinks: false
  {{- with .Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  securityContext:
    {{- include "foretoken.podSecurity" 10001 | nindent 4 }}
  # preStop, the drain, and 15 s for open connections and the worker's end
  terminationGracePeriodSeconds: {{ add $server.preStopSeconds (ceil .Values.settings.drain_timeout_s) 15 }}
  {{- with $server.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $server.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  containers:
    - name: server
      image: {{ include "foretoken.imageReference" (dict "image" .Values.image "tag" .Chart.AppVersion) | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args: [serve, --config, /etc/foretoken/serve.yaml]
      env:
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
        {{- with $server.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        - name: http
          containerPort: {{ include "foretoken.port" . }}
      # nothing is answered while weights are fetched: this probe waits for it, the others begin after it
      startupProbe:
        httpGet: {path: /health/startup, port: http}
        periodSeconds: 5
        timeoutSeconds: 2
        failureThreshold: {{ div (add $server.startupSeconds 4) 5 }}
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
      {{- if $server.preStopSeconds }}
      lifecycle:
        preStop:
          exec:
            command: [sleep, {{ $server.preStopSeconds | quote }}]
      {{- end }}
      resources:
        requests:
          {{- toYaml $server.resources.requests | nindent 10 }}
        limits:
          {{- toYaml $server.resources.limits | nindent 10 }}
          {{- if $server.gpus }}
          nvidia.com/gpu: {{ $server.gpus }}
          {{- end }}
      securityContext:
        {{- include "foretoken.containerSecurity" . | nindent 8 }}
      volumeMounts:
        - name: config
          mountPath: /etc/foretoken
          readOnly: true
        - name: cache
          mountPath: {{ include "foretoken.home" . }}
        - name: tmp
          mountPath: /tmp
  volumes:
    - name: config
      configMap:
        name: {{ include "foretoken.fullname" . }}
    - name: tmp
      emptyDir:
        sizeLimit: {{ $server.tmpSize }}
    {{- if eq .Values.cache.kind "ephemeral" }}
    - name: cache
      emptyDir:
        sizeLimit: {{ .Values.cache.size }}
    {{- else if eq .Values.cache.kind "existingClaim" }}
    - name: cache
      persistentVolumeClaim:
        claimName: {{ .Values.cache.existingClaim }}
    {{- end }}
  {{- with $server.hostMaxSkew }}
  topologySpreadConstraints:
    - maxSkew: {{ . }}
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "foretoken.selector" $of | nindent 10 }}
  {{- end }}
  {{- with $server.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $server.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $server.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
