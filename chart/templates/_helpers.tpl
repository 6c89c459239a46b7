{{/* Names are fixed, whatever the release is called: two HeadCNIs in one cluster would fight over its nodes. */}}

{{/* Every template begins with this: what the values lack is put into them. Helm does that for a release's first values, but `helm
     upgrade --reuse-values` gives a chart all values of the chart before it, without what has been added since, and null takes a
     value away. files/defaults.yaml is values.yaml, which Helm shows to no template. */}}
{{- define "headcni.defaults" -}}
{{- include "headcni.fill" (dict "into" .Values "from" (.Files.Get "files/defaults.yaml" | fromYaml)) -}}
{{- end }}

{{/* Maps that hold a user's own keys, or Kubernetes', are there or not as a whole: who takes a key out of one wants it out. */}}
{{- define "headcni.fill" -}}
{{- $whole := list "affinity" "appArmorProfile" "labels" "nodeSelector" "podAnnotations" "podLabels" "resources" "seccompProfile" "seLinuxOptions" -}}
{{- range $key, $default := .from -}}
{{- $value := index $.into $key -}}
{{- if kindIs "invalid" $value -}}
{{- $_ := set $.into $key $default -}}
{{- else if and (kindIs "map" $value) (kindIs "map" $default) (not (has $key $whole)) -}}
{{- include "headcni.fill" (dict "into" $value "from" $default) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "headcni.labels" -}}
{{ include "headcni.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: headcni
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* What selects pods never changes: selectors are immutable. */}}
{{- define "headcni.selector" -}}
app.kubernetes.io/name: headcni
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "headcni.podLabels" -}}
{{ include "headcni.labels" . }}
{{- with .root.Values.podLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "headcni.image" -}}
{{- with .Values.image -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{- define "headcni.key" -}}
{{- if and .Values.apiKey .Values.config.headscale.authKey }}
{{- fail "give the key once: as config.headscale.authKey or as apiKey" }}
{{- end }}
{{- .Values.apiKey | default .Values.config.headscale.authKey | trim }}
{{- end }}

{{- define "headcni.secret" -}}
{{ .Values.existingSecret | default "headcni-auth" }}
{{- end }}

{{/* daemon.yaml: config.* without the key. */}}
{{- define "headcni.daemonYAML" -}}
{{- $config := deepCopy .Values.config }}
{{- $_ := set $config "headscale" (omit $config.headscale "authKey") }}
{{- if .Values.caBundle }}
{{- $_ := set $config.headscale "caFile" "/etc/headcni/ca/ca.crt" }}
{{- end }}
{{- toYaml $config }}
{{- end }}

{{/* Two on one node have no room: both listen on the host's network. Without a cluster to ask (helm template) nothing is
     found, and two is right nearly everywhere. */}}
{{- define "headcni.replicas" -}}
{{- if kindIs "invalid" .Values.controller.replicas }}
{{- $linux := 0 }}
{{- range (lookup "v1" "Node" "" "").items }}
{{- if eq (index (.metadata.labels | default dict) "kubernetes.io/os") "linux" }}{{ $linux = add1 $linux }}{{ end }}
{{- end }}
{{- if eq (int $linux) 1 }}1{{ else }}2{{ end }}
{{- else }}
{{- .Values.controller.replicas }}
{{- end }}
{{- end }}

{{- define "headcni.dedicated" -}}
{{- if ne .Values.config.tailscale.mode "host" }}true{{ end }}
{{- end }}

{{/* Who and where the pod is, and where the API server is. */}}
{{- define "headcni.env" -}}
- name: NODE_NAME
  valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: POD_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
{{- with .Values.kubernetes.serviceHost }}
- name: KUBERNETES_SERVICE_HOST
  value: {{ . | quote }}
{{- end }}
{{- with .Values.kubernetes.servicePort }}
- name: KUBERNETES_SERVICE_PORT
  value: {{ . | quote }}
{{- end }}
{{- end }}

{{/* The same in every pod template. hostNetwork: the node's network is what they make or must not depend on. dnsPolicy:
     Headscale's name must be found before there is a cluster DNS. */}}
{{- define "headcni.podSpec" -}}
hostNetwork: true
dnsPolicy: Default
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
priorityClassName: {{ .values.priorityClassName }}
tolerations:
  {{- toYaml .values.tolerations | nindent 2 }}
nodeSelector:
  {{- merge (dict "kubernetes.io/os" "linux") .values.nodeSelector | toYaml | nindent 2 }}
{{- end }}

{{/* A container that changes the node's network; add lists its capabilities. */}}
{{- define "headcni.nodeSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsUser: 0
capabilities:
  drop: [ALL]
  add: {{ toJson .add }}
{{- with .root.Values.security.seccompProfile }}
seccompProfile: {{ toJson . }}
{{- end }}
{{- if semverCompare ">=1.30-0" .root.Capabilities.KubeVersion.Version }}
{{- with .root.Values.security.appArmorProfile }}
appArmorProfile: {{ toJson . }}
{{- end }}
{{- end }}
{{- with .root.Values.security.seLinuxOptions }}
seLinuxOptions: {{ toJson . }}
{{- end }}
{{- end }}

{{/* Before 1.30 AppArmor's profile is an annotation for each container. */}}
{{- define "headcni.podAnnotations" -}}
{{- $root := .root }}
{{- $profile := $root.Values.security.appArmorProfile }}
{{- if and $profile (semverCompare "<1.30-0" $root.Capabilities.KubeVersion.Version) }}
{{- range .containers }}
container.apparmor.security.beta.kubernetes.io/{{ . }}: {{ if eq $profile.type "Localhost" }}localhost/{{ $profile.localhostProfile }}{{ else if eq $profile.type "Unconfined" }}unconfined{{ else }}runtime/default{{ end }}
{{- end }}
{{- end }}
{{- with $root.Values.podAnnotations }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* HTTP probe of an address as in monitoring.listen. */}}
{{- define "headcni.probe" -}}
{{- $host := regexReplaceAll ":[0-9]+$" .listen "" | trimPrefix "[" | trimSuffix "]" }}
httpGet:
  # The host's network: kubelet is on the same one.
  host: {{ if or (empty $host) (eq $host "0.0.0.0") (eq $host "::") }}127.0.0.1{{ else }}{{ $host | quote }}{{ end }}
  port: {{ regexFind "[0-9]+$" .listen }}
  path: {{ .path }}
{{- end }}

{{- define "headcni.configVolumes" -}}
- name: config
  configMap: {name: headcni-config}
{{- end }}

{{- define "headcni.configMounts" -}}
- name: config
  mountPath: /etc/headcni/daemon.yaml
  subPath: daemon.yaml
  readOnly: true
{{- if .Values.caBundle }}
- name: config
  mountPath: /etc/headcni/ca/ca.crt
  subPath: ca.crt
  readOnly: true
{{- end }}
{{- end }}

{{/* Control-plane nodes first: the key is on no node without a replica. */}}
{{- define "headcni.controllerAffinity" -}}
nodeAffinity:
  preferredDuringSchedulingIgnoredDuringExecution:
    {{- $roles := list "node-role.kubernetes.io/control-plane" }}
    {{- if semverCompare "<1.24-0" .root.Capabilities.KubeVersion.Version }}
    {{- $roles = append $roles "node-role.kubernetes.io/master" }}
    {{- end }}
    {{- range $roles }}
    - weight: 100
      preference:
        matchExpressions:
          - {key: {{ . }}, operator: Exists}
    {{- end }}
podAntiAffinity:
  preferredDuringSchedulingIgnoredDuringExecution:
    - weight: 50
      podAffinityTerm:
        topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels:
            {{- include "headcni.selector" . | nindent 12 }}
{{- end }}
