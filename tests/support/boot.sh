#!/bin/bash
# A systemd of its own, as process 1 of a process namespace, over a throwaway copy of this machine's files: what it
# writes is in memory and gone with it. The network is the machine's. To be started by `unshare -C -p -m -u -i -f`, as root.
# Argument: a directory of this machine to be seen there, read only, under the same path.
set -euo pipefail
shared=$1
mount --make-rprivate /
mount -t tmpfs tmpfs /mnt
mkdir /mnt/up /mnt/work /mnt/root
mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/up,workdir=/mnt/work /mnt/root
cd /mnt/root
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t devtmpfs devtmpfs dev
mkdir -p dev/shm dev/pts
mount -t tmpfs tmpfs dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs tmpfs tmp
mkdir -p "./$shared"
mount --bind -o ro "$shared" "./$shared"
if [ -d /sys/fs/cgroup/systemd ]; then # both kinds of control groups, as this machine has them
  mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup
  mkdir sys/fs/cgroup/unified sys/fs/cgroup/systemd
  mount -t cgroup2 cgroup2 sys/fs/cgroup/unified
  mount -t cgroup -o none,name=systemd cgroup sys/fs/cgroup/systemd
else
  mount -t cgroup2 cgroup2 sys/fs/cgroup
fi

# Nothing of the machine's own starts, and nothing that would set the kernel or the devices, which are shared.
units=etc/systemd/system
find $units -mindepth 1 -delete
for unit in lib/systemd/system/{sysinit,basic,multi-user,timers,sockets,local-fs}.target.wants/*; do
  name=${unit##*/}
  case $name in systemd-journald*) ;; *) ln -sf /dev/null "$units/$name" ;; esac
done
mkdir -p run/systemd/system run/lock etc/systemd/journald.conf.d
printf '[Journal]\nStorage=volatile\nReadKMsg=no\n' > etc/systemd/journald.conf.d/guest.conf

mkdir -p mnt/old
pivot_root . mnt/old
umount -l /mnt/old
mount --make-rshared /
export container=guest PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
exec /lib/systemd/systemd --system --log-target=journal --unit=multi-user.target
