# Sourced by build.sh and by whoever runs go test or go vet in this folder.
#
# One set of flags for the three: other flags compile all 2,600 packages of Kubernetes again.
# -l (no inlining) and -dwarf=false take a third off the compile time; the price is 0.7 CPU seconds
# more at each start of the cluster.
export CGO_ENABLED=0
export GOFLAGS="-trimpath -buildvcs=false '-gcflags=all=-l -dwarf=false'"
GO=${GO:-go}

# The compiler's garbage collector costs a quarter of the build; with 8 GB of memory we can do without.
memory_kib=$(awk '/MemTotal/ {print $2}' /proc/meminfo)
if [ "${memory_kib:-0}" -gt 8000000 ]; then
    export GOGC=off GOMEMLIMIT=2GiB
else
    export GOGC=400
fi
