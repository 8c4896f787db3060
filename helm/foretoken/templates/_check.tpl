{{/* What a schema cannot say: values that contradict each other. */}}
{{- define "foretoken.check" -}}
{{- if not (regexMatch "^[a-z]" (include "foretoken.fullname" .)) -}}
{{- fail (printf "the release's name %s cannot begin a Service's: set fullnameOverride, or choose one that begins with a letter" .Release.Name) -}}
{{- end -}}
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
{{- if and (not .apiKeys.existingSecret) .apiKeys.existingSecretMetricsKey -}}
{{- fail "apiKeys.existingSecretMetricsKey: is used with apiKeys.existingSecret only" -}}
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
{{- range $pods := list "server" "gateway" "controller" "worker" -}}
{{- range (index $.Values $pods).extraEnv -}}
{{- if hasPrefix "FORETOKEN_" .name -}}
{{- fail (printf "%s.extraEnv: %s would hide what the chart sets; use settings" $pods .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if eq .Values.mode "cluster" -}}
{{- include "foretoken.checkCluster" . -}}
{{- else -}}
{{- include "foretoken.checkServer" . -}}
{{- end -}}
{{- end }}

{{- define "foretoken.checkServer" -}}
{{- with .Values -}}
{{- if .redis.enabled -}}
{{- fail "redis.enabled: a server has no store; it needs mode cluster" -}}
{{- end -}}
{{- if .store.existingSecret -}}
{{- fail "store.existingSecret: a server has no store; it needs mode cluster" -}}
{{- end -}}
{{- if and (hasPrefix "/" .model.name) (eq .cache.kind "ephemeral") -}}
{{- fail "model.name: a folder is on a volume: cache.kind must be perPod or existingClaim" -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "foretoken.checkCluster" -}}
{{- include "foretoken.checkTimes" .Values.settings -}}
{{- with .Values -}}
{{- if and .redis.enabled .store.existingSecret -}}
{{- fail "redis.enabled and store.existingSecret: give one of them" -}}
{{- end -}}
{{- if not (or .redis.enabled .store.existingSecret) -}}
{{- fail "store.existingSecret: mode cluster needs a store: name the Secret with its url, or set redis.enabled" -}}
{{- end -}}
{{- if and (hasPrefix "/" .model.name) (ne .cache.kind "existingClaim") -}}
{{- fail "model.name: a folder must be there for every pod of a cluster: cache.kind must be existingClaim" -}}
{{- end -}}
{{- range $role := list "attention" "expert" -}}
{{- $replicas := include "foretoken.numWorkers" (dict "root" $ "role" $role) | int -}}
{{- if not $replicas -}}
{{- fail (printf "workerGroups: mode cluster needs a group with role %s" $role) -}}
{{- end -}}
{{- if gt $replicas 256 -}}
{{- fail (printf "workerGroups: %d workers with role %s; a cluster has at most 256" $replicas $role) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if contains " " (include "foretoken.expertDevice" .) -}}
{{- fail "workerGroups: groups with role expert must all have a GPU, or none: an expert's size depends on it" -}}
{{- end -}}
{{- $seen := dict -}}
{{- range $group := .Values.workerGroups -}}
{{- $name := include "foretoken.groupName" (dict "root" $ "group" $group) -}}
{{- if hasKey $seen $name -}}
{{- fail (printf "workerGroups: two groups with role %s are called %s" $group.role $group.name) -}}
{{- end -}}
{{- $_ := set $seen $name true -}}
{{- if gt (len $name) 52 -}}
{{- fail (printf "workerGroups: %s has %d characters, and a StatefulSet's name 52: set a shorter fullnameOverride, or call the group something shorter" $name (len $name)) -}}
{{- end -}}
{{- $cache := include "foretoken.groupCache" (dict "root" $ "group" $group) | fromYaml -}}
{{- if and (eq $cache.kind "existingClaim") (not $cache.existingClaim) -}}
{{- fail (printf "workerGroups: cache.existingClaim of %s: name the PersistentVolumeClaim, or choose another kind" $group.name) -}}
{{- end -}}
{{- if and (hasPrefix "/" $.Values.model.name) (eq $cache.kind "ephemeral") -}}
{{- fail (printf "workerGroups: cache.kind of %s: model.name is a folder on a volume, so it must be perPod or existingClaim" $group.name) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/*
cluster/silence.py, `least_orphan_s` and `least_reroute_s`: what the processes would refuse at their start. A controller's
pod is known to hang after 31 s (its liveness probe), however short the leases.
*/}}
{{- define "foretoken.checkTimes" -}}
{{- $lease := default 1 .lease_s | float64 -}}
{{- $orphan := default 60 .orphan_timeout_s | float64 -}}
{{- $least := maxf 20 (mulf 15 $lease) -}}
{{- if lt $orphan $least -}}
{{- fail (printf "settings.orphan_timeout_s: %v must be at least %v where settings.lease_s is %v" $orphan $least $lease) -}}
{{- end -}}
{{- $reroute := default 60 .reroute_timeout_s | float64 -}}
{{- $least := addf 20 (mulf 2 $lease) (maxf 31 (mulf 5 $lease)) -}}
{{- if lt $reroute $least -}}
{{- fail (printf "settings.reroute_timeout_s: %v must be at least %v where settings.lease_s is %v" $reroute $least $lease) -}}
{{- end -}}
{{- end }}
