#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# First and only process of a guest: mounts, then the job that lies in /results, then power off.
# /results is shared with the host; everything that is to be seen there goes there.
export PATH=/usr/sbin:/usr/bin HOME=/root LANG=C.UTF-8
mount -t tmpfs tmpfs /run && mkdir -p /run/netns /dev/shm /dev/pts
[ -n "$(ls -A /tmp)" ] || mount -t tmpfs tmpfs /tmp # not above a checkout's environment
mount -t tmpfs tmpfs /dev/shm; mount -t devpts devpts /dev/pts
mount -t cgroup2 cgroup2 /sys/fs/cgroup; mount -t bpf bpf /sys/fs/bpf
mount -t debugfs debugfs /sys/kernel/debug; mount -t tracefs tracefs /sys/kernel/tracing
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 results /results || busybox poweroff -f
mount -t ext4 -o ro /dev/vdb /kernel
mount --bind /kernel/modules /usr/lib/modules; mount --bind /kernel/src /usr/src
# /dev/net/tun; ifb without the two devices that it makes otherwise; the two cards on the slow wire
modprobe tun; modprobe ifb numifbs=0; modprobe virtio_net
modprobe br_netfilter # what a test of bridges asks for: nobody loads it by name
tar -xf /results/checkout.tar -C / && rm /results/checkout.tar
ln -sf /proc/self/fd /dev/fd; ln -sf /proc/self/fd/0 /dev/stdin; ln -sf /proc/self/fd/1 /dev/stdout
ln -sf /proc/self/fd/2 /dev/stderr
hostname mfsd-guest
ip link set lo up
ldconfig 2>/dev/null
uname -r > /results/release
cut -d' ' -f1 /proc/uptime > /results/booted
bash /results/job.sh < /dev/null > /results/job.log 2>&1
echo $? > /results/status
dmesg > /results/dmesg.txt
sync
busybox poweroff -f
