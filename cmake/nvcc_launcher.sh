#!/bin/sh
# Runs the CUDA compiler. ptxas only remarks when it serialises the tensor-core instructions of a
# kernel, which costs most of their speed: here it is an error.
log=$("$@" 2>&1)
status=$?
[ -z "$log" ] || printf '%s\n' "$log" >&2
case "$log" in
  *wgmma*serialized*) exit 1 ;;
esac
exit $status
