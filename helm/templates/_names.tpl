{{/* The name of everything: short enough for KubeRay's suffixes, and a DNS label that begins with a letter. */}}
{{- define "trivium.name" -}}
{{- $name := ternary .Release.Name (printf "%s-trivium" .Release.Name) (contains "trivium" .Release.Name) -}}
{{- if not (regexMatch "^[a-z]" $name) }}{{ $name = printf "t%s" $name }}{{ end -}}
{{- $name | replace "." "-" | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* By which this release's pods are told from all others. KubeRay's head service selects by its own
     app.kubernetes.io/name, so that label stays KubeRay's on every Ray pod. */}}
{{- define "trivium.selector" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: trivium
{{- end -}}

{{- define "trivium.labels" -}}
app.kubernetes.io/name: trivium
{{ include "trivium.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "trivium.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag }}
{{- end -}}

{{/* Names of the four Secrets: those that exist already, or ours. */}}
{{- define "trivium.secret.rayToken" -}}
{{ .Values.secrets.rayToken | default (printf "%s-ray-token" (include "trivium.name" .)) }}
{{- end -}}
{{- define "trivium.secret.channel" -}}
{{ .Values.secrets.channel | default (printf "%s-channel" (include "trivium.name" .)) }}
{{- end -}}
{{- define "trivium.secret.gatewayToken" -}}
{{ .Values.secrets.gatewayToken | default (printf "%s-gateway-token" (include "trivium.name" .)) }}
{{- end -}}
{{- define "trivium.secret.operationsToken" -}}
{{ .Values.secrets.operationsToken | default (printf "%s-operations-token" (include "trivium.name" .)) }}
{{- end -}}

{{- define "trivium.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ int64 .Values.security.userId }}
runAsGroup: {{ int64 .Values.security.groupId }}
fsGroup: {{ int64 .Values.security.groupId }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "trivium.containerSecurity" -}}
runAsNonRoot: true
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
privileged: false
capabilities:
  drop: [ALL]
{{- end -}}
