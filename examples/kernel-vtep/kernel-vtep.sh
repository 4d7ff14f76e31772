#!/bin/sh
# kernel-vtep.sh TULLE: Tulle in one namespace, the kernel's vxlan in another, a ping across.
set -eu
tulle=$(realpath "${1:?usage: kernel-vtep.sh PATH-OF-TULLE}")
a=kvtep$$a b=kvtep$$b dir=$(mktemp -d)
pid=
finish() {
	[ -z "$pid" ] || { kill "$pid" 2>/dev/null && wait "$pid" || true; }
	ip netns del $a 2>/dev/null || true
	ip netns del $b 2>/dev/null || true
	rm -rf "$dir"
}
trap finish EXIT
trap 'exit 130' INT TERM

ip netns add $a
ip netns add $b
ip link add ul netns $a type veth peer name ul netns $b
ip -n $a address add 192.0.2.1/24 dev ul
ip -n $b address add 192.0.2.2/24 dev ul
ip -n $a link set ul up
ip -n $b link set ul up

ip -n $b link add vx0 type vxlan id 100 local 192.0.2.2 remote 192.0.2.1 dstport 4789
ip -n $b address add 10.32.0.2/16 dev vx0
ip -n $b link set vx0 mtu 1450 up

ip netns exec $a "$tulle" up --name here --state-dir "$dir" --socket "$dir/sock" \
	--overlay name=blue,vni=100,encryption=none,address=10.32.0.1/16,tap=blue0,peer=192.0.2.2 &
pid=$!
i=0
until ip netns exec $a ping -c1 -W1 -q 10.32.0.2 >/dev/null 2>&1; do
	i=$((i + 1))
	[ $i -lt 25 ] || { echo "no answer from the kernel's VTEP" >&2; exit 1; }
	sleep 0.2 # without a route, before the device is up, ping does not wait
done
ip netns exec $a ping -c3 -i0.2 10.32.0.2
"$tulle" --socket "$dir/sock" fdb blue
