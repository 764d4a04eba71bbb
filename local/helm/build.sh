#!/usr/bin/env bash
# Builds the helm command into OUTDIR, from the module beside this file: pinned by go.sum, no download of binaries.
#
#   local/helm/build.sh OUTDIR
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:?usage: local/helm/build.sh OUTDIR}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$here"
. ../goenv.sh
stamp=$({ "$GO" version; cat ../goenv.sh build.sh go.mod go.sum; } | sha256sum | cut -c1-64)
if [ -x "$out/helm" ] && [ "$(cat "$out/.stamp-helm" 2>/dev/null)" = "$stamp" ]; then
    echo "helm is up to date in $out"
    exit 0
fi
# Without its build flags helm believes that charts are for Kubernetes 1.20.
h=helm.sh/helm/v3
ldflags="-s -w -X $h/internal/version.version=v3.21.4"
for package in lint/rules chartutil; do
    ldflags+=" -X $h/pkg/$package.k8sVersionMajor=1 -X $h/pkg/$package.k8sVersionMinor=36"
done
../../.ci/progress "helm (a Go build)" "$GO" build -ldflags "$ldflags" -o "$out/helm.new" "$h/cmd/helm"
mv -f "$out/helm.new" "$out/helm"
echo "$stamp" >"$out/.stamp-helm"
