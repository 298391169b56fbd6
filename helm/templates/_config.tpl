{{/* cluster.yaml: the values tree `config`, and over it what Kubernetes decides. */}}
{{- define "trivium.config" -}}
{{- $filled := dict
  "model" (dict "folder" (printf "/models/%s" .Values.model.folder | trimSuffix "/"))
  "gateway" (dict "host" "0.0.0.0" "token_file" "/etc/trivium/secrets/gateway-token")
  "transport" (dict "scheme" "tcp" "host" "auto" "secret_file" "/etc/trivium/secrets/channel")
  "operations" (dict
    "enabled" true
    "host" "0.0.0.0"
    "token_file" "/etc/trivium/secrets/operations-token"
    "coordinator_resources" (dict "trivium_coordinator" 1))
  "dashboard" (dict "enabled" false)
-}}
{{- if .Values.secrets.gatewayTls -}}
  {{- $tls := dict "tls_certificate_file" "/etc/trivium-tls/tls.crt" "tls_key_file" "/etc/trivium-tls/tls.key" -}}
  {{- $_ := mergeOverwrite $filled.gateway $tls -}}
{{- end -}}
{{- range $name, $pool := .Values.pools -}}
  {{- $resources := dict (printf "trivium_%s" $name) 1 -}}
  {{- if $pool.gpu.perActor }}{{ $_ := set $resources "GPU" $pool.gpu.perActor }}{{ end -}}
  {{- $_ := set $filled $name (mergeOverwrite (dict "resources" $resources) (get $filled $name | default dict)) -}}
{{- end -}}
{{- mergeOverwrite (deepCopy .Values.config) $filled | toYaml }}
{{ end -}}

{{/* Nothing, or a refusal: Ray listens in every pod, and a port is one process's. */}}
{{- define "trivium.checkPorts" -}}
{{- $taken := dict "6379" "Ray" "8080" "Ray's metrics" "8265" "Ray's dashboard" "10001" "Ray's clients" "52365" "Ray's agent" -}}
{{- range list "gateway.port" "gateway.metrics_port" "operations.port" -}}
  {{- $key := splitList "." . -}}
  {{- $port := index $.Values.config (first $key) (last $key) | int | toString -}}
  {{- with get $taken $port -}}
    {{- fail (printf "config.%s: %s is the port of %s; choose another" (join "." $key) $port .) -}}
  {{- end -}}
  {{- $_ := set $taken $port (printf "config.%s" .) -}}
{{- end -}}
{{- end -}}

{{/* The hash of exactly the bytes of the mounted file; another one has Serve build the application anew. */}}
{{- define "trivium.revision" -}}
{{- include "trivium.config" . | sha256sum -}}
{{- end -}}

{{- define "trivium.serveConfig" -}}
{{- $application := dict
  "name" "trivium"
  "import_path" "cluster.pools:configured"
  "route_prefix" nil
  "external_scaler_enabled" true
  "args" (dict "config" "/etc/trivium/cluster.yaml" "revision" (include "trivium.revision" .))
-}}
{{- dict
  "proxy_location" "Disabled"
  "logging_config" (dict "log_level" "WARNING" "enable_access_log" false)
  "applications" (list $application)
  | toYaml -}}
{{- end -}}

{{/* How many actors a pool has: of what `config` says, `count`, `min` or `max`, in a dict as YAML. */}}
{{- define "trivium.counts" -}}
{{- $config := index .root.Values.config .name -}}
{{- if eq .name "experts" -}}
{{ dict "count" $config.shards_count "min" $config.shards_min "max" $config.shards_max | toYaml }}
{{- else if eq .name "gateway" -}}
{{ dict "count" $config.count "min" $config.count "max" $config.count | toYaml }}
{{- else -}}
{{ dict "count" $config.count "min" $config.count_min "max" $config.count_max | toYaml }}
{{- end -}}
{{- end -}}

{{/* How many pods a pool has, as YAML with `replicas`, `min`, `max`. */}}
{{- define "trivium.pods" -}}
{{- $pool := index .root.Values.pools .name -}}
{{- $counts := include "trivium.counts" . | fromYaml -}}
{{- $each := int $pool.actorsPerPod -}}
{{- $needed := div (add (int $counts.count) $each -1) $each -}}
{{- $replicas := int ($pool.replicas | default $needed) -}}
{{- if lt (mul $replicas $each) (int $counts.count) -}}
{{- fail (printf "pools.%s: %d pods of %d actors hold fewer than the %d that config asks for" .name $replicas $each (int $counts.count)) -}}
{{- end -}}
{{- $min := int ($pool.minReplicas | default (min $replicas (div (add (int $counts.min) $each -1) $each))) -}}
{{- $max := int ($pool.maxReplicas | default (max $replicas (div (add (int $counts.max) $each -1) $each))) -}}
{{- if or (lt $replicas $min) (gt $replicas $max) -}}
{{- fail (printf "pools.%s: replicas %d is not between minReplicas %d and maxReplicas %d" .name $replicas $min $max) -}}
{{- end -}}
{{ dict "replicas" $replicas "min" $min "max" $max | toYaml }}
{{- end -}}
