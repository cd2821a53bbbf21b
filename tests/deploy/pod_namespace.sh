#!/usr/bin/env bash
# Runs "$1" as a pod of the manifests would: uid 10001, no capabilities, a read-only root, /tmp empty, a network of its own
# with one address, Secrets that are root's with mode 0440. Everything ends with this process.
set -euo pipefail
script=$1
root=$2
interpreter=$3 # a folder that the user must be able to read, wherever it lies

mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /mnt
mkdir /mnt/interpreter
mount --bind "$interpreter" /mnt/interpreter
top=/$(cut -d/ -f2 <<< "$interpreter")
if [[ $(stat -c %A "$top") != *x ]]; then # others may not pass it
    mount -t tmpfs -o mode=755 tmpfs "$top"
    mkdir -p "$interpreter"
    mount --bind /mnt/interpreter "$interpreter"
fi
mkdir /mnt/project
mount --bind "$root" /mnt/project
mkdir /mnt/cluster /mnt/tokens /mnt/admin /mnt/scrape /mnt/settings
cp "$script" /mnt/run.sh
cp "$root"/deploy/kubernetes/overlays/local-cpu/generated/*.yaml /mnt/settings
sed -i "s#/opt/llama4/models#$root/models#" /mnt/settings/*.yaml
echo 0123456789abcdef0123456789abcdef > /mnt/cluster/secret
echo a-token-of-clients-0123 > /mnt/tokens/tokens
echo admin a-token-of-operators-0123 > /mnt/admin/tokens
echo a-token-of-scrapers-0123 > /mnt/scrape/token
chown -R root:10001 /mnt/{cluster,tokens,admin,scrape}
chmod 0440 /mnt/{cluster,tokens,admin,scrape}/*
chmod 0444 /mnt/run.sh
mount -o remount,ro,bind / /
mount -t tmpfs -o mode=1777 tmpfs /tmp
if [[ ! -d $root ]]; then # it lies in /tmp
    mkdir -p "$root"
    mount --bind /mnt/project "$root"
fi
ip link set lo up
ip addr add 10.9.9.9/24 dev lo
ip route add default dev lo src 10.9.9.9
cd "$root"
exec setpriv --reuid 10001 --regid 10001 --clear-groups --no-new-privs --bounding-set -all bash /mnt/run.sh
