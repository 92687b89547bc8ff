#!/usr/bin/env bash
# Run a command on each of two emulated hosts, node0 at 10.77.0.1 and node1 at 10.77.0.2, joined by a network eth0.
#
#   OUT=out/two_hosts unshare --net --mount bash tests/megatron/two_hosts.sh COMMAND [WORDS]  # as root
#
# A host has its own network, loopback and host name, which no name server knows; files are shared. NODE_RANK tells the
# command where it is. What host N prints goes to OUT/nodeN.log, the bytes that it sent to OUT/nodeN.bytes. All of it
# is gone when this script ends, since it lives in the namespaces that `unshare` has made.
set -euo pipefail

mount -t tmpfs none /run  # where `ip` keeps the names of namespaces
for host in 0 1; do ip netns add node$host; done
ip link add eth0 netns node0 type veth peer name eth0 netns node1
for host in 0 1; do
  ip -n node$host address add 10.77.0.$((host + 1))/24 dev eth0
  ip -n node$host link set lo up
  ip -n node$host link set eth0 up
done

declare -A processes
for host in 0 1; do
  # shellcheck disable=SC2016  # the host expands it
  NODE_RANK=$host ip netns exec node$host unshare --uts bash -c 'hostname "node$NODE_RANK" && exec "$@"' host "$@" \
    >"$OUT/node$host.log" 2>&1 &
  processes[$host]=$!
done
status=0
# The other host learns of a failure no sooner than on real machines; here there is no need to wait.
wait -n "${processes[@]}" || { status=$?; kill "${processes[@]}" 2>/dev/null || true; }
for host in 0 1; do
  wait "${processes[$host]}" || status=$?
  ip netns exec node$host cat /sys/class/net/eth0/statistics/tx_bytes >"$OUT/node$host.bytes"
done
exit $status
