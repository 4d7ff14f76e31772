#!/bin/sh
# rootless.sh TULLE: an ordinary user's node, and two programs of that user that talk in an overlay.
set -eu
tulle=$(realpath "${1:?usage: rootless.sh PATH-OF-TULLE}")
[ "$(id -u)" != 0 ] || { echo "run this as an ordinary user" >&2; exit 1; }
dir=$(mktemp -d)
# A node of its own beside one that this user may have.
export XDG_STATE_HOME="$dir/state" XDG_RUNTIME_DIR="$dir/run"
node= web=
finish() {
	for pid in $web $node; do
		kill "$pid" 2>/dev/null && wait "$pid" || true
	done
	rm -rf "$dir"
}
trap finish EXIT
trap 'exit 130' INT TERM

"$tulle" up --rootless --name here --advertise "${ADVERTISE:-127.0.0.1}" --listen '[::]:14789' --gossip '[::]:17946' &
node=$!
i=0
until "$tulle" status >/dev/null 2>&1; do
	kill -0 $node # else it has said why it ended
	i=$((i + 1))
	[ $i -lt 100 ] || { echo "the node does not come up" >&2; exit 1; }
	sleep 0.1
done
"$tulle" overlay create blue --subnet 10.32.0.0/16

# One program, in user and network namespaces of its own, for as long as it runs …
"$tulle" run blue --name web --ip 10.32.0.10 -- sleep 600 &
web=$!
until "$tulle" endpoints | grep -q web; do
	kill -0 $web
	sleep 0.1
done
# … and another, which is root there, and nobody special outside.
"$tulle" run blue -- sh -c 'id -u; ip -brief address show eth0; ping -c3 -i0.2 10.32.0.10'
