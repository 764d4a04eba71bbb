#!/usr/bin/env bash
# Builds tuneward-local, tuneward-shim and a `kubectl` link into OUTDIR.
#
#   local/build.sh OUTDIR
#
# The first build compiles Kubernetes: 3 minutes on two idle cores, 90 MB of downloads, 3 GB of disk in
# Go's caches. Nothing is done when OUTDIR already holds a build of these sources with this Go.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:?usage: local/build.sh OUTDIR}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$here"
. ./goenv.sh

version=v1.36.3
stamp=$({
    "$GO" version
    cat goenv.sh build.sh go.mod go.sum
    find . -name '*.go' ! -name '*_test.go' -print0 | sort -z | xargs -0 sha256sum
} | sha256sum | cut -c1-64)
if [ -x "$out/tuneward-local" ] && [ -x "$out/tuneward-shim" ] && [ "$(cat "$out/.stamp" 2>/dev/null)" = "$stamp" ]; then
    echo "tuneward-local is up to date in $out"
    exit 0
fi

v=k8s.io/component-base/version
ldflags="-s -w -X $v.gitVersion=$version -X $v.gitMajor=1 -X $v.gitMinor=36 -X $v.gitTreeState=clean"
work=$(mktemp -d "$out/.build.XXXXXX")
trap 'rm -rf "$work"' EXIT

"$GO" build -v -ldflags "$ldflags" -o "$work/" ./cmd/... >"$work/log" 2>&1 &
builder=$!
trap 'kill $builder 2>/dev/null || true; rm -rf "$work"' EXIT
SECONDS=0
said=0
while kill -0 "$builder" 2>/dev/null; do
    sleep 0.2
    if [ $((SECONDS - said)) -ge 10 ]; then
        said=$SECONDS
        compiled=$(grep -c -v ' ' "$work/log" || true)
        downloaded=$(grep -c '^go: downloading' "$work/log" || true)
        if [ "$compiled" != 0 ]; then
            doing=", $compiled packages compiled (about 2,600 the first time)"
        elif [ "$downloaded" != 0 ]; then
            doing=", $downloaded modules downloaded"
        else
            doing=""
        fi
        echo "building tuneward-local: $SECONDS s$doing"
    fi
done
if ! wait "$builder"; then
    grep ' ' "$work/log" | tail -40 >&2
    echo "local/build.sh: go build failed; its last messages are above" >&2
    exit 1
fi

# Renames, not copies: a running cluster keeps the binary it was started from.
mv -f "$work/tuneward-local" "$work/tuneward-shim" "$out/"
ln -sfn tuneward-local "$out/kubectl"
echo "$stamp" >"$out/.stamp"
echo "built tuneward-local in $SECONDS s: $out"
