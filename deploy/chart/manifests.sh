#!/bin/bash
# Makes the plain manifests, which are for `kubectl apply`, from the chart.
#
# Usage: deploy/chart/manifests.sh [FOLDER]      (FOLDER instead of deploy/)
set -euo pipefail
here=$(dirname "$(realpath "$0")")
out=${1:-$here/..}
helm=$("$here/../setup/tools.sh")/helm

# Usage: render FILE [OPTION OF helm template]...
render() {
    local file=$out/$1
    shift
    {
        echo "# Made from deploy/chart/gambeson by \`make manifests\`: change it there."
        "$helm" template gambeson "$here/gambeson" --namespace kube-system --skip-tests "$@" |
            grep -v '^ *app.kubernetes.io/managed-by: Helm$'
    } >"$file"
}

render gambeson.yaml
# For k3s with --flannel-backend=none: its pod network.
render k3s.yaml --set podCidr=10.42.0.0/16
