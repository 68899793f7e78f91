#!/bin/bash
# Brings a lab up, verifies it and says what to type next. A lab of the same name that is up
# already makes way.
#
# Usage: deploy/setup/lab.sh GAMBESON [OPTION OF lab up]...
set -euo pipefail

gambeson=$1
shift

name=()
previous=
for word in "$@"; do
    [ "$previous" != --name ] || name=(--name "$word")
    [[ $word != --name=* ]] || name=("$word")
    previous=$word
done

"$gambeson" lab down ${name[@]+"${name[@]}"} >/dev/null 2>&1 || true
"$gambeson" lab up "$@"

verified=0
"$gambeson" lab verify ${name[@]+"${name[@]}"} || verified=$?
lab="$gambeson lab"
more=${name[*]+ ${name[*]}}
cat <<END

The lab is up. Look around:
  $lab status$more
  $lab exec$more node-1 -- gambeson status
  $lab exec$more pod-1-1 -- ip addr
  kubectl --kubeconfig <($lab kubeconfig$more) get nodes -o yaml
Stop it:
  $lab down$more
END
exit "$verified"
