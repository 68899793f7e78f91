{{- define "gambeson.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* Never to be changed: the selector of a DaemonSet is fixed. */}}
{{- define "gambeson.selectorLabels" -}}
app.kubernetes.io/name: gambeson
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "gambeson.labels" -}}
{{ include "gambeson.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: gambeson
{{- end -}}

{{/* The whole of Flannel's net-conf.json that the agent reads. */}}
{{- define "gambeson.netConf" -}}
{{- if not (or .Values.podCidr .Values.podCidrv6) -}}
{{- fail "podCidr: give the cluster's pod network, or podCidrv6 for one of IPv6 alone" -}}
{{- end -}}
{{- if and .Values.flannel (not (has .Values.flannel .Values.transports)) -}}
{{- fail (printf "transports: name %s as well, by which nodes of Flannel are reached" .Values.flannel) -}}
{{- end -}}
{{- $backend := dict "Type" (.Values.flannel | default "wireguard") -}}
{{- if has "wireguard" .Values.transports }}{{ $_ := set $backend "ListenPort" (int .Values.port) }}{{ end -}}
{{- $_ := set $backend "Transports" .Values.transports -}}
{{- if .Values.mtu }}{{ $_ := set $backend "MTU" (int .Values.mtu) }}{{ end -}}
{{- $conf := dict "EnableIPv4" (ne .Values.podCidr "") "EnableIPv6" (ne .Values.podCidrv6 "") "Backend" $backend -}}
{{- if .Values.podCidr }}{{ $_ := set $conf "Network" .Values.podCidr }}{{ end -}}
{{- if .Values.podCidrv6 }}{{ $_ := set $conf "IPv6Network" .Values.podCidrv6 }}{{ end -}}
{{ $conf | toPrettyJson }}
{{- end -}}

{{/* What both pods have in common. */}}
{{- define "gambeson.pod" -}}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Whether any node may need a userspace device. */}}
{{- define "gambeson.supervised" -}}
{{- if ne .Values.wireguard "kernel" }}true{{ end -}}
{{- end -}}

{{/* Which node it runs on, and where the API server is before kube-proxy runs. */}}
{{- define "gambeson.environment" -}}
- name: NODE_NAME
  valueFrom:
    fieldRef:
      fieldPath: spec.nodeName
- name: HOST_IP
  valueFrom:
    fieldRef:
      fieldPath: status.hostIP
{{- with .Values.k8sServiceHost }}
- name: KUBERNETES_SERVICE_HOST
  value: {{ . | quote }}
{{- end }}
{{- with .Values.k8sServicePort }}
- name: KUBERNETES_SERVICE_PORT
  value: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* A container that runs as root with one capability, `add`, and no other right; `privileged` is for runtimes that want it. */}}
{{- define "gambeson.security" -}}
runAsUser: 0
runAsGroup: 0
readOnlyRootFilesystem: true
{{- if .privileged }}
privileged: true
{{- else }}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
  add: [{{ .add }}]
seccompProfile:
  type: RuntimeDefault
{{- end }}
{{- with .root.Values.seLinuxOptions }}
seLinuxOptions: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
