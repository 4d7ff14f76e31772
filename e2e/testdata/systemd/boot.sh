#!/bin/sh
# boot.sh FOLDER CGROUP: systemd as the first process of namespaces of its own. Its root is this machine's, with all changes in
# memory and no unit of /etc. The network is the caller's. For a mount namespace of its own.
set -e
mount --make-rprivate /
mount -t tmpfs none "$1"
cd "$1"
mkdir upper work root groups
mount -t overlay -o lowerdir=/,upperdir=upper,workdir=work none root
mount -t cgroup2 none groups
mkdir "groups/$2"
echo $$ >"groups/$2/cgroup.procs"
umount groups
exec unshare --cgroup --pid --ipc --uts --fork --kill-child sh -ec '
cd root
mount -t proc none proc
mount -t sysfs none sys
mount -t cgroup2 none sys/fs/cgroup
mount -t tmpfs none run
mount -t tmpfs none tmp
mount -t tmpfs -o mode=755 none dev
for d in null zero full random urandom tty; do touch dev/$d; mount --bind /dev/$d dev/$d; done
mkdir dev/net dev/pts dev/shm
mknod dev/net/tun c 10 200
mount -t devpts -o newinstance,ptmxmode=666 none dev/pts
ln -s pts/ptmx dev/ptmx
rm -rf etc/systemd/system
mkdir -p etc/systemd/system run/old
echo service >etc/hostname
pivot_root . run/old
umount -l /run/old
rmdir /run/old
mount --make-rshared /
export container=other
exec /lib/systemd/systemd --system --unit=basic.target --show-status=no </dev/null'
