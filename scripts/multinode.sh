#!/usr/bin/env bash
# Train on several hosts: run the same line on each, with its own RANK. docs/many-nodes.md says more.
#   bash scripts/multinode.sh HOSTS RANK FIRST INTERFACE [CONFIG] [--section.key value ...]
#   bash scripts/multinode.sh 2 0 10.0.0.1 eth0 configs/X.toml       on the first of two hosts
#   bash scripts/multinode.sh 2 1 10.0.0.1 eth0 configs/X.toml       on the second one
#   bash scripts/multinode.sh 1:2 0 10.0.0.1 eth0 configs/X.toml     elastic: goes on with one of the two
# HOSTS      how many: 2. Or MIN:MAX, for a run that goes on while hosts other than the first leave and return
# RANK       which one this is: 0 on the first host, then 1, 2, ...
# FIRST      an address of the first host that all others reach, or its name; with a port as in 10.0.0.1:29501
#            (default: 29500)
# INTERFACE  the network interface between the hosts, as in eth0; auto takes the one that leads to FIRST
# Environment: NPROC, ranks on this host (default: one a GPU, else 2); WAIT, seconds to wait for the other hosts
# (default: 600). Paths count from where you stand.
set -euo pipefail
for ARGUMENT in "$@"; do
  case $ARGUMENT in
    -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 0 ;;
  esac
done
refuse() {
  echo "error: $1. See bash scripts/multinode.sh --help" >&2
  exit 2
}
[[ $# -ge 4 ]] || refuse "HOSTS RANK FIRST INTERFACE are needed, and there are $# arguments"
HOSTS=$1 RANK=$2 FIRST=$3 INTERFACE=$4
shift 4
[[ $HOSTS =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || refuse "HOSTS is $HOSTS: needs a number, as in 2, or MIN:MAX"
[[ $RANK =~ ^[0-9]+$ ]] || refuse "RANK is $RANK: needs a number, 0 on the first host"
[[ $FIRST != -* && $FIRST != *.toml ]] || refuse "FIRST is $FIRST: needs the address of the first host"
[[ $INTERFACE != -* && $INTERFACE != *.toml ]] || refuse "INTERFACE is $INTERFACE: needs a name, as in eth0, or auto"
PORT=29500
if [[ $FIRST =~ ^(.+):([0-9]+)$ ]]; then
  FIRST=${BASH_REMATCH[1]} PORT=${BASH_REMATCH[2]}
fi
if ! [[ $PORT =~ ^[0-9]{1,5}$ ]] || ((10#$PORT < 1 || 10#$PORT > 65535)); then
  refuse "FIRST has the port $PORT: needs 1 to 65535"
fi
[[ ${WAIT:=600} =~ ^[1-9][0-9]{0,4}$ ]] || refuse "WAIT is $WAIT: needs a number of seconds, up to 99999"
[[ ${NPROC:=auto} =~ ^(auto|cpu|gpu|[1-9][0-9]{0,3})$ ]] || refuse "NPROC is $NPROC: needs a number of ranks, or auto"
source "$(dirname "$0")/env.sh" "" # without an argument it would see those of this script

with_config "$@"
if [[ $INTERFACE != auto ]]; then
  # "=" is NCCL's word for this name exactly; without it, it is a prefix.
  export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME="=$INTERFACE"
fi

OPTIONS=(--nnodes "$HOSTS" --node-rank "$RANK" --nproc-per-node "$NPROC")
if [[ $HOSTS == *:* ]]; then
  # The store of the rendezvous must not be that of the ranks, or a host that returns finds the ranks' old keys in it.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  # last_call_timeout: seconds that a run with MIN hosts or more waits for another one before it starts.
  OPTIONS+=(--max-restarts 10 --rdzv-backend c10d --rdzv-endpoint "$FIRST:$PORT" --rdzv-id titan-ulysses
    --rdzv-conf "is_host=$((RANK == 0)),join_timeout=$WAIT,last_call_timeout=5")
else
  OPTIONS+=(--master-addr "$FIRST" --master-port "$PORT" --rdzv-conf "join_timeout=$WAIT")
fi

exec "$PYTHON" "$ROOT/scripts/launch.py" "${OPTIONS[@]}" "$ROOT/train.py" "${ARGUMENTS[@]}"
