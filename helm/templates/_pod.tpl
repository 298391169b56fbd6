{{/* The pod of a Ray node. Takes a dict: root, name (the component), group (its values), ports, readiness, and pods,
     how many of a worker group. */}}
{{- define "trivium.pod" -}}
{{- $root := .root -}}
{{- $values := .root.Values -}}
{{- $gpus := int (mul (dig "gpu" "perActor" 0 .group) (dig "actorsPerPod" 1 .group)) -}}
{{- $resources := deepCopy .group.resources -}}
{{- $nodeSelector := deepCopy .group.nodeSelector -}}
{{- if $gpus -}}
  {{- $_ := set $resources.requests .group.gpu.resource (toString $gpus) -}}
  {{- $_ := set $resources.limits .group.gpu.resource (toString $gpus) -}}
  {{- if .group.gpu.product }}{{ $_ := set $nodeSelector "nvidia.com/gpu.product" .group.gpu.product }}{{ end -}}
{{- end -}}
metadata:
  labels:
    {{- include "trivium.selector" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .name }}
  {{- if or .pods .group.annotations }}
  annotations:
    {{- with .group.annotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- with .pods }}
    # KubeRay compares clusters without their counts of pods: only a changed template has it take up changed ones. Where
    # pods follow actors the count of the moment is the autoscaler's, and elsewhere its bounds mean nothing.
    trivium/pods: {{ ternary (printf "%v-%v" .min .max) (toString .replicas) $values.ray.podsFollowActors | quote }}
    {{- end }}
  {{- end }}
spec:
  serviceAccountName: {{ include "trivium.name" $root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add (int $values.drain.replacementSeconds) (int $values.drain.finishSeconds) (int $values.drain.marginSeconds) }}
  securityContext:
    {{- include "trivium.podSecurity" $root | nindent 4 }}
  {{- with $values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with .group.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with .group.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- $same := merge (include "trivium.selector" $root | fromYaml) (dict "app.kubernetes.io/component" $.name) }}
    {{- $constraints := list }}
    {{- range . }}
    {{- $constraints = append $constraints (merge (deepCopy .) (dict "labelSelector" (dict "matchLabels" $same))) }}
    {{- end }}
    {{- toYaml $constraints | nindent 4 }}
  {{- end }}
  initContainers:
    # The image has the machine code compiled; where it may be written, more of it can be kept.
    - name: machine-code
      image: {{ include "trivium.image" $root }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      command: [cp, -r, /opt/trivium/machine-code/., /var/cache/trivium]
      securityContext:
        {{- include "trivium.containerSecurity" $root | nindent 8 }}
      resources:
        requests: {cpu: 100m, memory: 64Mi}
        limits: {cpu: "1", memory: 256Mi}
      volumeMounts:
        - {name: machine-code, mountPath: /var/cache/trivium}
  containers:
    - name: {{ ternary "ray-head" "ray-worker" (eq .name "head") }}
      image: {{ include "trivium.image" $root }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      securityContext:
        {{- include "trivium.containerSecurity" $root | nindent 8 }}
      resources:
        {{- toYaml $resources | nindent 8 }}
      ports:
        {{- range $port, $number := .ports }}
        - name: {{ $port }}
          containerPort: {{ int $number }}
        {{- end }}
      env:
        - {name: HOME, value: /home/trivium}
        - {name: NUMBA_CACHE_DIR, value: /var/cache/trivium}
        - {name: TRITON_CACHE_DIR, value: /var/cache/trivium/triton}
        - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
        - {name: RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO, value: "0"}
        - {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: "0"} # preStop has drained the node by then
        {{- with .group.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      readinessProbe:
        {{- toYaml .readiness | nindent 8 }}
        initialDelaySeconds: 10
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: {{ ternary 2 10 (eq .name "gateway") }}
      livenessProbe:
        httpGet: {path: /api/healthz, port: 52365}
        initialDelaySeconds: 60
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 30
      lifecycle:
        preStop:
          exec:
            command: [python, /etc/trivium/leave.py, {{ $values.drain.finishSeconds | quote }}, {{ $values.drain.replacementSeconds | quote }}]
      volumeMounts:
        - {name: settings, mountPath: /etc/trivium, readOnly: true}
        - {name: models, mountPath: /models, readOnly: true}
        - {name: tmp, mountPath: /tmp}
        - {name: ray-logs, mountPath: /tmp/ray}
        - {name: home, mountPath: /home/trivium}
        - {name: machine-code, mountPath: /var/cache/trivium}
        - {name: shared-mem, mountPath: /dev/shm}
        {{- if and (eq .name "gateway") $values.secrets.gatewayTls }}
        - {name: tls, mountPath: /etc/trivium-tls, readOnly: true}
        {{- end }}
        {{- with .group.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    # Every Ray pod holds Ray's token, which runs code in all of them: to split these files by pod would hide nothing.
    - name: settings
      projected:
        defaultMode: 0440
        sources:
          - configMap:
              name: {{ include "trivium.name" $root }}-config
          - secret:
              name: {{ include "trivium.secret.channel" $root }}
              items: [{key: secret, path: secrets/channel}]
          - secret:
              name: {{ include "trivium.secret.gatewayToken" $root }}
              items: [{key: token, path: secrets/gateway-token}]
          - secret:
              name: {{ include "trivium.secret.operationsToken" $root }}
              items: [{key: token, path: secrets/operations-token}]
    {{- if and (eq .name "gateway") $values.secrets.gatewayTls }}
    - name: tls
      secret:
        secretName: {{ $values.secrets.gatewayTls }}
        defaultMode: 0440
        items: [{key: tls.crt, path: tls.crt}, {key: tls.key, path: tls.key}]
    {{- end }}
    - name: models
      {{- if eq (empty $values.model.persistentVolumeClaim) (empty $values.model.hostPath) }}
      {{- fail "model: set exactly one of persistentVolumeClaim and hostPath" }}
      {{- else if $values.model.hostPath }}
      hostPath: {path: {{ $values.model.hostPath | quote }}, type: Directory}
      {{- else }}
      persistentVolumeClaim: {claimName: {{ $values.model.persistentVolumeClaim | quote }}, readOnly: true}
      {{- end }}
    - {name: tmp, emptyDir: {sizeLimit: {{ $values.scratch.tmp }}}}
    - {name: ray-logs, emptyDir: {sizeLimit: {{ $values.scratch.logs }}}}
    - {name: home, emptyDir: {sizeLimit: {{ $values.scratch.home }}}}
    - {name: machine-code, emptyDir: {sizeLimit: {{ $values.scratch.machineCode }}}}
    - {name: shared-mem, emptyDir: {medium: Memory, sizeLimit: {{ .group.sharedMemory }}}}
    {{- if and (eq .name "head") $values.ray.podsFollowActors }}
    # Mounted by the autoscaler alone: the actors beside it never see Kubernetes' API.
    - name: kubernetes-api
      projected:
        defaultMode: 0440
        sources:
          - serviceAccountToken: {path: token, expirationSeconds: 3607}
          - configMap:
              name: kube-root-ca.crt
              items: [{key: ca.crt, path: ca.crt}]
          - downwardAPI:
              items:
                - path: namespace
                  fieldRef: {fieldPath: metadata.namespace}
    {{- end }}
    {{- with .group.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}
