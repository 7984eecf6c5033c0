#!/usr/bin/env bash
# What docs/cluster.md describes, from the first machine of machines.sh: up, submit, a lost driver, submit again, down.
#
#   tests/netns/scenario.sh CLUSTER.yaml OUT ADDRESS ...      what came back from the cluster lies in OUT afterwards
set -euo pipefail
yaml=$1 out=$2
shift 2
here=$(dirname "$0")
step() { echo "--- $(date +%T) $*"; }

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
ray get-auth-token --generate >/dev/null 2>&1

step up
ray up --yes "$yaml"

step dashboard
ray dashboard "$yaml" &
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265
alive() { ray list nodes --filter state=ALIVE --format json 2>/dev/null | grep -o '"node_id"' | wc -l; }
until [[ $(alive) == "$#" ]]; do sleep 10; done

step "without the token"
curl --silent --output /dev/null --write-out '%{http_code}' "$RAY_API_SERVER_ADDRESS/api/jobs/" >"$out/without-token"

submit() { # what the file is called that gets the exit code
  local code=0
  ray job submit --working-dir "$here/job" -- python search.py || code=$?
  echo "$code" >"$out/$1"
}
step "submit: its driver is killed"
submit first
step "submit again: it goes on"
submit second

step "what came of it"
ray rsync-down "$yaml" '~/raysq_runs/' "$out/"

step down
ray down --yes "$yaml"
left() { for machine; do ssh -o StrictHostKeyChecking=no "$machine" pgrep --list-full "'raylet|gcs_server'"; done || true; }
for _ in $(seq 60); do # `ray down` ends Ray on the head; a worker gives up when it has missed that for a minute
  [[ -z $(left "$@" 2>/dev/null) ]] && break
  sleep 5
done
left "$@" >"$out/left"
