#!/usr/bin/env bash
# Runs a command on a pretended machine, 10.77.0.1, beside N more that it reaches by ssh: 10.77.0.10, 10.77.0.11, ...
#
#   tests/netns/machines.sh N DIRECTORY COMMAND [ARGUMENT ...]      (as root; "bash" is a command too)
#
# A machine has a network, processes, a host name, /root, /tmp, /run and /dev/shm of its own, what is on disk in DIRECTORY.
# It sees the rest of this disk, and VIRTUAL_ENV (default: .venv here), as ~/raysq-env too, over which it writes its own
# (overlay). No machine reaches any other network. The key, made for this one run, lies in the first machine's ~/.ssh/id_ed25519.
#
# All of it hangs in one process namespace: when this script ends, however it ends, the kernel ends every process,
# mount, interface and namespace in it. Nothing outside of it is seen or touched by a `ray stop` inside.
set -euo pipefail

if [[ ${1:-} != --inside ]]; then
  here=$(cd "$(dirname "$0")/../.." && pwd -P)
  venv=$(cd "${VIRTUAL_ENV:-$here/.venv}" && pwd -P)
  python=$(dirname "$(dirname "$(readlink -f "$venv/bin/python3")")")
  exec setpriv --pdeathsig KILL unshare --net --mount --pid --uts --ipc --fork --kill-child=KILL --mount-proc \
    "$0" --inside "$here" "$venv" "$python" "$@"
fi
here=$2 venv=$3 python=$4 machines=$5 directory=$(cd "$6" && pwd -P)
shift 6

# Gives this mount namespace what a machine has for itself, in the folder $1.
own_disk() {
  mkdir -p "$1"/{root/raysq-env,tmp,upper,work,venv}
  # more than Ray's own patience, for all these machines share the cores of one
  echo "export RAY_raylet_start_wait_time_s=60 RAY_agent_register_timeout_ms=300000" >"$1/root/.bashrc"
  mount -t overlay overlay -o "lowerdir=$venv,upperdir=$1/upper,workdir=$1/work" "$1/venv"
  mount --bind "$1/venv" "$1/root/raysq-env"
  for kept in "$here" "$venv" "$python" "$directory"; do
    for hidden in /root /tmp; do
      if [[ $kept == "$hidden"/* ]]; then
        mkdir -p "$1$kept"
        mount --rbind "$kept" "$1$kept"
      fi
    done
  done
  mount --rbind "$1/root" /root
  mount --rbind "$1/tmp" /tmp
  mount --rbind "$1/venv" "$venv"
  mount -t tmpfs tmpfs /dev/shm
  mount -t tmpfs tmpfs /run
  mkdir /run/sshd
  mount --bind "$directory/hosts" /etc/hosts
  mount --bind "$directory/nsswitch.conf" /etc/nsswitch.conf
}

machine() { # number; in namespaces of its own
  hostname "machine$1"
  own_disk "$directory/$1"
  ip link set lo up
  until ip link show eth0 &>/dev/null; do sleep 0.1; done
  ip address add "10.77.0.$((9 + $1))/24" dev eth0
  ip link set eth0 up
  ip route add default via 10.77.0.1 # Ray asks the kernel which of its addresses leads out
  exec /usr/sbin/sshd -D -f "$directory/sshd_config" -E "$directory/$1/sshd.log"
}

hostname machine0
echo "hosts: files" >"$directory/nsswitch.conf" # there is no name server to wait for
{
  echo 127.0.0.1 localhost
  echo 10.77.0.1 machine0
  for number in $(seq "$machines"); do echo "10.77.0.$((9 + number)) machine$number"; done
} >"$directory/hosts"
ssh-keygen -q -t ed25519 -N "" -C "" -f "$directory/host_key"
ssh-keygen -q -t ed25519 -N "" -C "" -f "$directory/key"
cat >"$directory/sshd_config" <<END
HostKey $directory/host_key
AuthorizedKeysFile $directory/key.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PidFile none
END

ip link add bridge0 type bridge
ip address add 10.77.0.1/24 dev bridge0
ip link set bridge0 up
ip link set lo up

export -f machine own_disk
export here venv python directory
for number in $(seq "$machines"); do
  unshare --net --mount --pid --uts --ipc --fork --kill-child=KILL --mount-proc bash -euc "machine $number" &
  until [[ $(readlink "/proc/$!/ns/net") != "$(readlink /proc/self/ns/net)" ]]; do sleep 0.1; done
  ip link add "veth$number" type veth peer name eth0 netns "$!"
  ip link set "veth$number" master bridge0 up
done
own_disk "$directory/0"
install -D -m 600 "$directory/key" /root/.ssh/id_ed25519
for number in $(seq "$machines"); do
  until (: >"/dev/tcp/10.77.0.$((9 + number))/22") 2>/dev/null; do sleep 0.1; done
done
cd "$here"
HOME=/root "$@"
