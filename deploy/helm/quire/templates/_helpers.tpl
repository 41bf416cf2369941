{{- define "quire.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "quire.fullname" -}}
{{- if .Values.fullnameOverride }}{{ .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains (include "quire.name" .) .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name (include "quire.name" .) | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "quire.selector" -}}
app.kubernetes.io/name: {{ include "quire.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "quire.labels" -}}
{{ include "quire.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "quire.image" -}}
{{- $suffix := eq .Values.profile "gpu" | ternary "-cuda" "" -}}
{{- .Values.image.repository -}}
{{- with .Values.image.digest }}@{{ . }}{{ else }}:{{ default (print .Chart.AppVersion $suffix) .Values.image.tag }}{{ end -}}
{{- end }}

{{- define "quire.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ default (include "quire.fullname" .) .Values.serviceAccount.name }}
{{- else }}{{ default "default" .Values.serviceAccount.name }}{{ end }}
{{- end }}

{{- /* The label model_name of the metrics. */}}
{{- define "quire.modelName" -}}
{{- default (default "quire-builtin" .Values.model.name) .Values.model.servedName }}
{{- end }}

{{- define "quire.claim" -}}
{{- if and .Values.persistence.enabled .Values.model.name (not .Values.model.image) }}
{{- default (printf "%s-models" (include "quire.fullname" .)) .Values.persistence.existingClaim }}
{{- end }}
{{- end }}

{{- define "quire.graceSeconds" -}}
{{- with .Values.shutdown }}{{ add .preStopSeconds .drainDelaySeconds .timeoutSeconds 5 | int }}{{ end }}
{{- end }}

{{- /* The resources of a server: what the user gave, or the profile's. With (dict "root" . "resources" R). */}}
{{- define "quire.resources" -}}
{{- if .resources }}{{ toYaml .resources }}
{{- else if .root.Values.resources }}{{ toYaml .root.Values.resources }}
{{- else if eq .root.Values.profile "gpu" -}}
requests: {cpu: "4", memory: 32Gi, nvidia.com/gpu: "1"}
limits: {memory: 32Gi, nvidia.com/gpu: "1"}
{{- else -}}
requests: {cpu: "4", memory: 8Gi}
limits: {memory: 8Gi}
{{- end }}
{{- end }}

{{- /* The file for --config. With (dict "root" . "config" EXTRA "resources" R). */}}
{{- define "quire.config" -}}
{{- $values := .root.Values }}
{{- $config := dict "port" 8000 "log_format" "json" "device" (eq $values.profile "gpu" | ternary "cuda" "cpu") }}
{{- $_ := set $config "shutdown_timeout" $values.shutdown.timeoutSeconds }}
{{- $_ := set $config "drain_delay" $values.shutdown.drainDelaySeconds }}
{{- with $values.model.name }}{{ $_ := set $config "model" . }}{{ end }}
{{- with $values.model.servedName }}{{ $_ := set $config "served_model_name" (list .) }}{{ end }}
{{- with $values.apiKeysFile }}{{ if .existingSecret }}
{{- $_ := set $config "api_keys_file" (print "/etc/quire-keys/" .key) }}
{{- end }}{{ end }}
{{- with $values.admin }}{{ if .enabled }}
{{- if and (ne .host "127.0.0.1") (not .existingSecret) }}
{{- fail "admin.existingSecret: name a Secret with a key, as admin.host is not 127.0.0.1" }}
{{- end }}
{{- $_ := set $config "admin_host" .host }}
{{- $_ := set $config "admin_port" (int .port) }}
{{- end }}{{ end }}
{{- if $values.kvDisk.enabled }}
{{- $_ := set $config "kv_disk_path" "/kv/tier" }}
{{- $_ := set $config "kv_disk_size" $values.kvDisk.size }}
{{- end }}
{{- if eq $values.profile "cpu" }}
{{- $resources := include "quire.resources" . | fromYaml }}
{{- $cores := dig "requests" "cpu" "" $resources | toString }}
{{- if hasSuffix "m" $cores }}{{ $cores = div (add (trimSuffix "m" $cores | int) 999) 1000 | toString }}{{ end }}
{{- with $cores }}{{ $_ := set $config "cpu_threads" (. | float64 | ceil | int) }}{{ end }}
{{- end }}
{{- mergeOverwrite $config (deepCopy $values.config) (deepCopy (default dict .config)) | toYaml }}
{{- end }}

{{- define "quire.security" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "quire.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "quire.secretEnv" -}}
- name: {{ .name }}
  valueFrom: {secretKeyRef: {name: {{ .secret.existingSecret | quote }}, key: {{ .secret.key | quote }}}}
{{- end }}

{{- /* What pods of servers and proxy have in common. */}}
{{- define "quire.podCommon" -}}
serviceAccountName: {{ include "quire.serviceAccount" . }}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ include "quire.graceSeconds" . }}
securityContext:
  {{- include "quire.security" . | nindent 2 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{ toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "quire.probes" -}}
# /health says that the engine makes progress, also while it drains; /ready whether to send requests here.
startupProbe:
  httpGet: {path: /health, port: http}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ div (add .Values.startupSeconds 4) 5 }}
livenessProbe:
  httpGet: {path: /health, port: http}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
readinessProbe:
  httpGet: {path: /ready, port: http}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
lifecycle:
  preStop: {sleep: {seconds: {{ .Values.shutdown.preStopSeconds }}}}
{{- end }}

{{- /* A server's pod template. With (dict "root" . "role" "" "config" C "resources" R). */}}
{{- define "quire.serverPod" -}}
{{- $values := .root.Values }}
{{- $resources := include "quire.resources" . | fromYaml }}
{{- $config := include "quire.config" . | fromYaml }}
metadata:
  labels:
    {{- include "quire.selector" .root | nindent 4 }}
    app.kubernetes.io/component: {{ default "server" .role }}
    {{- with $values.podLabels }}{{ toYaml . | nindent 4 }}{{ end }}
  annotations:
    checksum/config: {{ include "quire.config" . | sha256sum }}
    {{- with $values.podAnnotations }}{{ toYaml . | nindent 4 }}{{ end }}
spec:
  {{- include "quire.podCommon" .root | nindent 2 }}
  {{- with $values.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $values.nodeSelector }}
  nodeSelector: {{ toYaml . | nindent 4 }}
  {{- end }}
  {{- if or $values.tolerations (eq $values.profile "gpu") }}
  tolerations:
    {{- if eq $values.profile "gpu" }}
    - {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}
    {{- end }}
    {{- with $values.tolerations }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- end }}
  topologySpreadConstraints:
    {{- with $values.topologySpreadConstraints }}{{ toYaml . | nindent 4 }}{{ else }}
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "quire.selector" .root | nindent 10 }}
          app.kubernetes.io/component: {{ default "server" .role }}
    {{- end }}
  containers:
    - name: quire
      image: {{ include "quire.image" .root }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      # The image's entry point is `quire`, as process 1: it gets SIGTERM.
      args:
        - serve
        - --config
        - /etc/quire/config.yaml
        {{- if .role }}
        - --kv-transfer-config
        - {{ include "quire.kvTransfer" . | quote }}
        {{- end }}
        {{- range $values.extraArgs }}
        - {{ . | quote }}
        {{- end }}
      env:
        - {name: HOME, value: /tmp}
        - {name: QUIRE_CACHE_DIR, value: /cache/quire} # a directory in the mount, which is not the user's own
        - {name: TRITON_CACHE_DIR, value: /cache/triton}
        - {name: HF_HOME, value: /models}
        {{- if or (not $values.model.download) (not $values.model.name) $values.model.image }}
        - {name: HF_HUB_OFFLINE, value: "1"}
        {{- end }}
        {{- with $values.apiKey }}{{ if .existingSecret }}
        {{- include "quire.secretEnv" (dict "name" "QUIRE_API_KEY" "secret" .) | nindent 8 }}
        {{- end }}{{ end }}
        {{- with $values.admin }}{{ if and .enabled .existingSecret }}
        {{- include "quire.secretEnv" (dict "name" "QUIRE_ADMIN_API_KEY" "secret" .) | nindent 8 }}
        {{- end }}{{ end }}
        {{- with $values.hfToken }}{{ if .existingSecret }}
        {{- include "quire.secretEnv" (dict "name" "HF_TOKEN" "secret" .) | nindent 8 }}
        {{- end }}{{ end }}
        {{- if .role }}
        - name: POD_IP
          valueFrom: {fieldRef: {fieldPath: status.podIP}}
        {{- end }}
        {{- with $values.extraEnv }}{{ toYaml . | nindent 8 }}{{ end }}
      ports:
        - {name: http, containerPort: 8000}
        {{- if $values.admin.enabled }}
        - {name: admin, containerPort: {{ $values.admin.port }}}
        {{- end }}
        {{- if eq .role "prefill" }}
        - {name: kv, containerPort: {{ $values.disaggregation.kvPort }}}
        {{- end }}
      {{- include "quire.probes" .root | nindent 6 }}
      resources: {{ toYaml $resources | nindent 8 }}
      securityContext:
        {{- include "quire.containerSecurity" .root | nindent 8 }}
      volumeMounts:
        - {name: config, mountPath: /etc/quire, readOnly: true}
        - {name: cache, mountPath: /cache}
        - {name: tmp, mountPath: /tmp}
        - {name: models, mountPath: /models}
        {{- if $values.model.image }}
        - {name: model, mountPath: /model, readOnly: true}
        {{- end }}
        {{- if gt (int (default 1 $config.tensor_parallel_size)) 1 }}
        - {name: shm, mountPath: /dev/shm}
        {{- end }}
        {{- if $values.kvDisk.enabled }}
        - {name: kv, mountPath: /kv}
        {{- end }}
        {{- if $values.apiKeysFile.existingSecret }}
        - {name: api-keys, mountPath: /etc/quire-keys, readOnly: true} # not by subPath, which is never updated
        {{- end }}
        {{- if .role }}
        - {name: kv-key, mountPath: /etc/quire-kv, readOnly: true}
        {{- end }}
        {{- with $values.extraVolumeMounts }}{{ toYaml . | nindent 8 }}{{ end }}
  volumes:
    - name: config
      configMap: {name: {{ include "quire.fullname" .root }}{{ with .role }}-{{ . }}{{ end }}}
    - name: cache
      emptyDir: {sizeLimit: {{ $values.cache.sizeLimit }}}
    - name: tmp
      emptyDir: {sizeLimit: 1Gi}
    - name: models
      {{- with include "quire.claim" .root }}
      persistentVolumeClaim: {claimName: {{ . }}}
      {{- else }}
      emptyDir: {}
      {{- end }}
    {{- if $values.model.image }}
    {{- if semverCompare "<1.35.0-0" .root.Capabilities.KubeVersion.Version }}
    {{- fail "model.image needs Kubernetes 1.35: older API servers drop the volume without a word. Use persistence instead." }}
    {{- end }}
    - name: model
      image: {reference: {{ $values.model.image | quote }}, pullPolicy: IfNotPresent}
    {{- end }}
    {{- if gt (int (default 1 $config.tensor_parallel_size)) 1 }}
    - name: shm # what ranks exchange; counts as the pod's memory
      emptyDir: {medium: Memory, sizeLimit: 8Gi}
    {{- end }}
    {{- if $values.kvDisk.enabled }}
    - name: kv
      emptyDir: {sizeLimit: {{ add $values.kvDisk.size 1 }}Gi}
    {{- end }}
    {{- with $values.apiKeysFile }}{{ if .existingSecret }}
    - name: api-keys
      secret: {secretName: {{ .existingSecret }}, defaultMode: 0440}
    {{- end }}{{ end }}
    {{- if .role }}
    - name: kv-key
      secret:
        secretName: {{ required "disaggregation.kvKey.existingSecret: name a Secret with the key that the pods share" $values.disaggregation.kvKey.existingSecret }}
        items: [{key: {{ $values.disaggregation.kvKey.key }}, path: key}]
        defaultMode: 0440
    {{- end }}
    {{- with $values.extraVolumes }}{{ toYaml . | nindent 4 }}{{ end }}
{{- end }}

{{- define "quire.kvTransfer" -}}
{{- $values := .root.Values.disaggregation }}
{{- $extra := dict "key_file" "/etc/quire-kv/key" }}
{{- if eq .role "decode" }}
{{- $network := required "disaggregation.podNetwork: the network of the cluster's pods, like 10.244.0.0/16" $values.podNetwork }}
{{- $_ := set $extra "peers" (list (printf "%s:%d" $network (int $values.kvPort))) }}
{{- end }}
{{- $config := dict "kv_connector" "TCPConnector" "kv_role" (eq .role "prefill" | ternary "kv_producer" "kv_consumer") }}
{{- if eq .role "prefill" }}
{{- $_ := set $config "kv_ip" "$(POD_IP)" }}
{{- $_ := set $config "kv_port" (int $values.kvPort) }}
{{- end }}
{{- set $config "kv_connector_extra_config" $extra | toJson }}
{{- end }}
