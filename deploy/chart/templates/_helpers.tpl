{{- define "gptq-api.name" -}}
{{- .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- end -}}

{{- define "gptq-api.selector" -}}
app: gptq-api
app.kubernetes.io/name: gptq-api
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "gptq-api.labels" -}}
{{ include "gptq-api.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "gptq-api.claim" -}}
{{- .Values.cache.existingClaim | default (printf "%s-cache" (include "gptq-api.name" .)) -}}
{{- end -}}

{{/* What the schema cannot say: values that do not go together, a sentence each. */}}
{{- define "gptq-api.check" -}}
{{- if and .Values.apiKeys.existingSecret .Values.allowUnauthenticated -}}
{{- fail "apiKeys.existingSecret and allowUnauthenticated say the opposite; leave one of them out" -}}
{{- end -}}
{{- if not (or .Values.apiKeys.existingSecret .Values.allowUnauthenticated) -}}
{{- fail "apiKeys.existingSecret is empty: name a Secret with a file of keys (kubectl create secret generic keys --from-file=keys.toml), or say allowUnauthenticated=true" -}}
{{- end -}}
{{- if and (ne .Values.device "cuda") (gt (int .Values.gpus) 1) -}}
{{- fail (printf "gpus is %d, and device is %s, which has none; say device=cuda, or leave gpus out" (int .Values.gpus) .Values.device) -}}
{{- end -}}
{{- $many := or (gt (int .Values.replicas) 1) (and .Values.autoscaling.enabled (gt (int .Values.autoscaling.maxReplicas) 1)) -}}
{{- if and $many .Values.cache.enabled (not .Values.cache.existingClaim) (not (has "ReadWriteMany" .Values.cache.accessModes)) -}}
{{- fail (printf "cache.accessModes is %s, a disk for one node, and there may be several pods: take ReadWriteMany, a cache.existingClaim, or cache.enabled=false" (join "," .Values.cache.accessModes)) -}}
{{- end -}}
{{- if and .Values.autoscaling.enabled (lt (int .Values.autoscaling.maxReplicas) (int .Values.autoscaling.minReplicas)) -}}
{{- fail (printf "autoscaling.maxReplicas is %d, less than autoscaling.minReplicas, which is %d" (int .Values.autoscaling.maxReplicas) (int .Values.autoscaling.minReplicas)) -}}
{{- end -}}
{{- if and .Values.serviceMonitor.enabled .Values.apiKeys.existingSecret (not .Values.serviceMonitor.bearerSecret) -}}
{{- fail "serviceMonitor.bearerSecret is empty: with apiKeys, /metrics needs a key of the role metrics; name the Secret that has it" -}}
{{- end -}}
{{- end -}}
